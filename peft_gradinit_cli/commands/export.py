"""`peft-gradinit export`: an adapter in the form that is needed."""

from pathlib import Path
from typing import Annotated

import typer

from ..output import results_alone
from . import options


def export(
    adapter: Annotated[str, typer.Argument(help="A saved adapter: folder or Hub name.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Its base model. Default: the one that the adapter names.", metavar="MODEL"
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(help="peft, serving (vLLM, SGLang, TGI) or merged.")
    ] = "peft",
    rank: options.Rank = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Write an adapter for PEFT, for inference servers, or merged into its base model.

    **peft** is what `save_pretrained` writes. **serving** has one rank that servers accept, the
    scaling inside the weights, and no patterns. **merged** is the whole model.

        peft-gradinit export out/lora_ga out/serving --base MODEL --target serving --rank 16
    """
    with results_alone():
        from ..work.export import run

    run(adapter, output, base=base, target=target, rank=rank, overwrite=overwrite, as_json=as_json)
