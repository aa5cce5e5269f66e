"""`peft-gradinit compare`: two adapters or calibrations, and what an adapter put in front."""

from pathlib import Path
from typing import Annotated

import typer

from ..output import results_alone
from . import options

_INTRUDERS = "Intruder dimensions"

TOP, THRESHOLD = 10, 0.5
"""Those of `peft_gradinit.analysis`, which cannot be imported without torch."""


def compare(
    context: typer.Context,
    first: Annotated[str, typer.Argument(help="An adapter or a calibration.")],
    second: Annotated[
        str | None, typer.Argument(help="Another one of the same kind and base model.")
    ] = None,
    base: options.Base = None,
    top: Annotated[
        int,
        typer.Option(min=1, help="Leading vectors looked at.", rich_help_panel=_INTRUDERS),
    ] = TOP,
    threshold: Annotated[
        float,
        typer.Option(help="Largest cosine of an intruder.", rich_help_panel=_INTRUDERS),
    ] = THRESHOLD,
    mitigate: Annotated[
        Path | None,
        typer.Option(
            help="Write FIRST with its intruders scaled by --factor.",
            metavar="FOLDER",
            rich_help_panel=_INTRUDERS,
        ),
    ] = None,
    factor: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="0 removes intruders, 1 keeps them.", rich_help_panel=_INTRUDERS
        ),
    ] = 0.0,
    rank: options.Rank = None,
    plot: options.Plot = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Compare two adapters, or two calibrations: subspace angles and effective ranks.

    With --base, count *intruder dimensions* of the first adapter: leading singular vectors of the
    tuned weight that resemble none of the original one (arXiv 2410.21228). They go along with
    forgetting. --mitigate writes the adapter with them scaled down, as a plain LoRA.

        peft-gradinit compare out/lora out/lora_ga --plot out/pictures

        peft-gradinit compare out/lora --base MODEL --mitigate out/mitigated
    """
    options.needed_by(context, "--base", base, "top", "threshold", "rank")
    options.needed_by(context, "--mitigate", mitigate, "factor", "overwrite")
    with results_alone():
        from ..work.compare import run

    run(
        first,
        second,
        base=base,
        top=top,
        threshold=threshold,
        mitigate=mitigate,
        factor=factor,
        rank=rank,
        plot=plot,
        overwrite=overwrite,
        as_json=as_json,
    )
