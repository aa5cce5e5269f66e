"""`peft-gradinit inspect`: what a calibration found, or what an adapter holds."""

from pathlib import Path
from typing import Annotated

import typer

from ..output import results_alone
from . import options


def inspect(
    path: Annotated[
        str, typer.Argument(help="A calibration (file or folder) or an adapter (folder, Hub name).")
    ],
    base: options.Base = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Mean rank that the suggestions share out. Default: half of that measured."
        ),
    ] = None,
    plot: options.Plot = None,
    html: Annotated[
        Path | None,
        typer.Option(
            help="Write a page with all of it, which needs no other file.", metavar="FILE"
        ),
    ] = None,
    as_json: options.AsJson = False,
) -> None:
    """Show a calibration or an adapter layer by layer, and which layers deserve rank.

    Of a **calibration**: the norm of every layer's statistic, how much of its energy the leading
    singular values capture, and ranks that would share the same sum better. With --plot: spectra
    and a map of the suggested ranks.

    Of an **adapter**: size, effective rank and energy captured at the start of every layer. With
    --base, sizes are relative to the weights. With --plot: a map of the ranks and, with --base, of
    how far every layer has moved.

        peft-gradinit inspect out/calibration --plot out/pictures --html out/report.html
    """
    with results_alone():
        from ..work.inspect import run

    run(path, base=base, rank=rank, plot=plot, html=html, as_json=as_json)
