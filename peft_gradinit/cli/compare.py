"""`peft-gradinit compare`: two adapters or calibrations, and what an adapter put in front."""

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import typer

from ..calibration import CalibrationResult
from ..errors import ConfigError
from ..plots import draw_angles
from ..saved import (
    LayerComparison,
    LayerIntruders,
    compare_adapters,
    compare_calibrations,
    find_intruders,
    mitigated_updates,
    read_adapter,
    summary,
    write_adapter,
)
from ..saved.intruders import THRESHOLD, TOP
from . import options
from .bases import weights_of
from .output import Column, Listing, print_json

_INTRUDERS = "Intruder dimensions"


def compare(
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
    if second is None and base is None:
        raise ConfigError(
            "give a second adapter (or calibration) to compare with, or --base to look for intruder "
            "dimensions."
        )
    if mitigate is not None and base is None:
        raise ConfigError("--mitigate needs the original weights; give --base.")
    shown: dict[str, Listing] = {}
    if second is not None:
        shown["comparison"] = _compare_two(first, second, plot)
    if base is not None:
        adapter = read_adapter(first)
        lines = find_intruders(
            adapter,
            weights_of(base, adapter),
            top=top,
            threshold=threshold,
            factor=factor,
            rank=rank,
        )
        shown["intruders"] = _of_intruders(lines)
        if mitigate is not None:
            write_adapter(mitigate, adapter, mitigated_updates(lines), overwrite=overwrite)
            shown["intruders"].facts["mitigated"] = str(mitigate)
            shown["intruders"].facts["largest error of the truncation"] = max(
                line.error for line in lines
            )
    if as_json and len(shown) == 2:
        print_json({name: listing.content() for name, listing in shown.items()})
        return
    for listing in shown.values():
        listing.show(as_json)


def _compare_two(first: str, second: str, plot: Path | None) -> Listing:
    kinds = [options.is_calibration(path) for path in (first, second)]
    if kinds[0] != kinds[1]:
        raise ConfigError(
            f"{first!r} is {_kind(kinds[0])} and {second!r} is {_kind(kinds[1])}; compare two of one "
            "kind."
        )
    if kinds[0]:
        lines = compare_calibrations(*(CalibrationResult.load(path) for path in (first, second)))
    else:
        lines = compare_adapters(read_adapter(first), read_adapter(second))
    facts: dict[str, Any] = dict(summary(lines))
    if plot is not None:
        names = Path(first).name, Path(second).name
        facts["picture"] = str(draw_angles(lines, plot / "angles.png", names=names))
    columns = [
        Column("name", "layer"),
        Column("first_effective_rank", "effective rank", ".1f"),
        Column("second_effective_rank", "and", ".1f"),
        Column("input_angle", "largest input angle", ".1f"),
        Column("output_angle", "output angle, degrees", ".1f"),
    ]
    if not kinds[0]:
        columns += [Column("cosine", "cosine", ".3f"), Column("distance", "distance", ".3f")]
    return Listing("", columns, [_row(line) for line in lines], facts)


def _row(line: LayerComparison) -> dict[str, Any]:
    row = dataclasses.asdict(line)
    row["first_effective_rank"], row["second_effective_rank"] = row.pop("effective_ranks")
    for side in ("input", "output"):
        degrees = [math.degrees(angle) for angle in row.pop(f"{side}_angles")]
        row[f"{side}_angles"], row[f"{side}_angle"] = degrees, degrees[-1] if degrees else None
    return row


def _of_intruders(lines: list[LayerIntruders]) -> Listing:
    columns = (
        Column("layer", "layer"),
        Column("intruders", "intruders", "d"),
        Column("positions", "among the leading values", "list"),
    )
    rows = [
        {
            "layer": line.name,
            "intruders": len(line.positions),
            "positions": line.positions,
            "singular_values": line.singular_values,
            "error": line.error,
        }
        for line in lines
    ]
    facts = {
        "intruders": sum(len(line.positions) for line in lines),
        "layers with intruders": sum(bool(line.positions) for line in lines),
    }
    return Listing("", columns, rows, facts)


def _kind(is_calibration: bool) -> str:
    return "a calibration" if is_calibration else "an adapter"
