"""`peft-gradinit convert`: adapters whose start wrote into the base, freed of it."""

from pathlib import Path
from typing import Annotated

import typer

from ..output import results_alone
from . import options


def convert(
    adapter: Annotated[
        str, typer.Argument(help="A trained PiSSA, OLoRA, CorDA or PEFT-LoRA-GA adapter.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder of the plain LoRA adapter.")],
    initial: Annotated[
        str | None,
        typer.Option(help="The same adapter, saved right after get_peft_model.", metavar="FOLDER"),
    ] = None,
    base: options.Base = None,
    residual: Annotated[
        str | None,
        typer.Option(
            help="The base model as its start left it; needs --base, too.", metavar="MODEL"
        ),
    ] = None,
    rank: options.Rank = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Turn an adapter whose start wrote into the base model into plain LoRA on the untouched base.

    PEFT's PiSSA, OLoRA, CorDA and LoRA-GA train beside `W - s B0 A0`. On the original model such a
    file computes something else. What has to be known is `s B0 A0`:

    - **--initial**: from the adapter as it was saved right after its start (always works);
    - **--base** alone: computed from the original weights again (PiSSA with the full SVD, OLoRA);
    - **--base and --residual**: the difference of the original and the overwritten model.

    The result has twice the rank and is exact; --rank truncates it and says what that loses.

        peft-gradinit convert out/pissa out/plain --base MODEL
    """
    with results_alone():
        from ..work.convert import run

    run(
        adapter,
        output,
        initial=initial,
        base=base,
        residual=residual,
        rank=rank,
        overwrite=overwrite,
        as_json=as_json,
    )
