"""`peft-gradinit start`: a model, data, and an adapter to continue from."""

from pathlib import Path
from typing import Annotated

import typer

from ..output import results_alone
from . import methods, options
from .measured import Measured, takes_measured


@takes_measured
def start(
    model: Annotated[str, typer.Argument(help="Hub name, folder, or embedded:pico-llama.")],
    data: Annotated[
        str,
        typer.Argument(
            help="Hub name, folder, .jsonl, .json, .parquet, .csv, .txt, or embedded:docstrings."
        ),
    ],
    output: Annotated[Path, typer.Argument(help="Folder of the adapter.")],
    *,
    measured: Measured,
    method: Annotated[
        str, typer.Option(help=methods.HELP_OF_PLAIN, rich_help_panel=options.ADAPTER)
    ] = "lora_one",
    lora_alpha: Annotated[
        float | None, typer.Option(help="Default: PEFT's, 8.", rich_help_panel=options.ADAPTER)
    ] = None,
    use_rslora: Annotated[
        bool,
        typer.Option(
            "--use-rslora", help="Scale by alpha / sqrt(r).", rich_help_panel=options.ADAPTER
        ),
    ] = False,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Compute a start and save it as a plain LoRA adapter, to be trained elsewhere.

    Everything that continues from a LoRA adapter of PEFT can train it: LLaMA-Factory, axolotl,
    ms-swift, unsloth. They need neither this package nor a recent PEFT. The lines to paste are
    printed, with the learning rate.

    **Which methods**: LoRA-One and EVA. For them that is the same run as with `LoraOneConfig` and
    `EvaConfig`: the same function at step 0, and the same numbers are trained. LoRA-GA, CorDA, PiSSA,
    MiLoRA and OLoRA keep their start fixed beside what they train, and SVFit trains a few numbers a
    layer. A plain adapter of theirs has the right function, but would be trained as another
    adapter. They are refused.

        peft-gradinit start embedded:pico-llama embedded:docstrings out/start --max-tokens 4096
    """
    with results_alone():
        from ..work.start import run

    sections = measured.sections(model, data, method)
    sections["method"] |= {"lora_alpha": lora_alpha, "use_rslora": use_rslora}
    run(
        **sections,
        folder=output,
        overwrite=overwrite,
        device=measured.device,
        as_json=as_json,
    )
