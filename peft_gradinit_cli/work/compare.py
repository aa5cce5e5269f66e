"""What `peft-gradinit compare` does."""

import dataclasses
import math
from pathlib import Path
from typing import Any

from peft_gradinit.analysis import (
    LayerComparison,
    LayerIntruders,
    compare_adapters,
    compare_calibrations,
    draw_angles,
    find_intruders,
    mitigated_updates,
    summary,
)
from peft_gradinit.calibration import CalibrationResult
from peft_gradinit.errors import ConfigError
from peft_gradinit.records import check_place, read_adapter, write_adapter

from ..output import Column, Listing, layers_told, print_json
from .bases import weights_of
from .kinds import is_calibration


def run(
    first: str,
    second: str | None,
    *,
    base: str | None,
    top: int,
    threshold: float,
    mitigate: Path | None,
    factor: float,
    rank: int | None,
    plot: Path | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Compare two adapters or calibrations, and look for intruders.

    Args:
        first: an adapter or a calibration.
        second: another one of the same kind.
        base: the original base model of the first; needed for intruders.
        top: leading vectors looked at.
        threshold: largest cosine of an intruder.
        mitigate: folder of the first adapter with its intruders scaled.
        factor: by which they are scaled.
        rank: of the scaled adapter.
        plot: folder of the pictures.
        overwrite: replace what is in `mitigate`.
        as_json: print JSON.

    Raises:
        ConfigError: if options are missing, or the two are of different kinds.
    """
    if second is None and base is None:
        raise ConfigError(
            "give a second adapter (or calibration) to compare with, or --base to look for intruder "
            "dimensions."
        )
    if mitigate is not None and base is None:
        raise ConfigError("--mitigate needs the original weights; give --base.")
    if plot is not None and second is None:
        raise ConfigError(
            "--plot draws the angles between two; give a second one, or leave it out."
        )
    if mitigate is not None:
        check_place(mitigate, overwrite=overwrite)
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
    kinds = [is_calibration(path) for path in (first, second)]
    if kinds[0] != kinds[1]:
        raise ConfigError(
            f"{first!r} is {_kind(kinds[0])} and {second!r} is {_kind(kinds[1])}; compare two of one "
            "kind."
        )
    if kinds[0]:
        compared = compare_calibrations(*(CalibrationResult.load(p) for p in (first, second)))
    else:
        compared = compare_adapters(read_adapter(first), read_adapter(second))
    lines = compared.layers
    facts: dict[str, Any] = dict(summary(lines))
    facts["only in the first"] = layers_told(compared.only_in_first)
    facts["only in the second"] = layers_told(compared.only_in_second)
    if plot is not None:
        names = Path(first).name, Path(second).name
        facts["picture"] = str(draw_angles(lines, plot / "angles.png", names=names))
    columns = [
        Column("name", "layer"),
        Column("first_effective_rank", "effective rank of the first", ".1f", 2),
        Column("second_effective_rank", "effective rank of the second", ".1f", 1),
        Column("input_angle", "largest input angle, degrees", ".1f"),
        Column("output_angle", "largest output angle, degrees", ".1f"),
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


def _kind(calibrated: bool) -> str:
    return "a calibration" if calibrated else "an adapter"
