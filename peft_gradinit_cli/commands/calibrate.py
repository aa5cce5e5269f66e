"""`peft-gradinit calibrate`: a model, data, and a result directory."""

from pathlib import Path
from typing import Annotated

import typer

from ..output import results_alone
from . import methods, options
from .measured import Measured, takes_measured


@takes_measured
def calibrate(
    model: Annotated[str, typer.Argument(help="Hub name, folder, or embedded:pico-llama.")],
    data: Annotated[
        str | None,
        typer.Argument(
            help="Hub name, folder, .jsonl, .json, .parquet, .csv, .txt, or embedded:docstrings."
        ),
    ] = None,
    output: Annotated[Path | None, typer.Argument(help="Folder of the result.")] = None,
    *,
    context: typer.Context,
    measured: Measured,
    method: Annotated[
        str, typer.Option(help=methods.HELP, rich_help_panel=options.ADAPTER)
    ] = "lora_ga",
    dry_run: Annotated[
        bool,
        typer.Option(
            help="Say what it would cost, and stop. Needs no weights, and without DATA takes "
            "sequences of --max-length tokens."
        ),
    ] = False,
    processes: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="For --dry-run: how many processes share the data. Default: those launched.",
        ),
    ] = None,
    save_every: Annotated[
        float,
        typer.Option(min=0, help="Seconds between two saves of the unfinished sums; see --resume."),
    ] = 60.0,
    resume: Annotated[bool, typer.Option(help="Continue after a kill, to the same result.")] = True,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Measure what a method needs, and keep it in a folder.

    The folder is what `calibration=` of a config takes: `LoraGAConfig(…, calibration="FOLDER")`.
    Under `accelerate launch -m peft_gradinit_cli calibrate …` every process reads its share.

    Try it without a network:

        peft-gradinit calibrate embedded:pico-llama embedded:docstrings out/calibration --max-tokens 4096

    What it would cost, from the config of a model alone:

        peft-gradinit calibrate configs/shapes/llama-3-70b --dry-run --processes 8
    """
    options.needed_by(context, "--dry-run", dry_run, "processes")
    with results_alone():
        from ..work.calibrate import run

    run(
        **measured.sections(model, data, method),
        place={
            "folder": output,
            "overwrite": overwrite,
            "resume": resume,
            "save_every": save_every,
        },
        device=measured.device,
        processes=processes,
        dry_run=dry_run,
        as_json=as_json,
    )
