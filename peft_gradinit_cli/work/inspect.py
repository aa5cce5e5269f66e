"""What `peft-gradinit inspect` does."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_gradinit.analysis import draw_drift, draw_rank_map, draw_spectra, suggested_ranks
from peft_gradinit.calibration import CalibrationResult
from peft_gradinit.errors import ConfigError, GradInitError
from peft_gradinit.files import check_writable
from peft_gradinit.linalg import effective_rank, rounding_of
from peft_gradinit.records import SavedAdapter, read_adapter, read_provenance, relative_norm

from ..output import Column, Listing, Said, layers_told
from .bases import weights_of
from .kinds import is_calibration
from .page import write_page

_FULL, _EMPTY = 0.8, 0.3
"""Effective rank over `r` above which a layer could use more, and below which less would do."""


def run(
    path: str,
    *,
    base: str | None,
    rank: int | None,
    plot: Path | None,
    html: Path | None,
    as_json: bool,
) -> None:
    """Show a calibration or an adapter layer by layer.

    Args:
        path: of either.
        base: the original base model of an adapter.
        rank: mean rank that the suggestions for a calibration share out. Default: half of the largest
            that it serves.
        plot: folder of the pictures.
        html: file of a page that has all of it.
        as_json: print JSON.

    Raises:
        ConfigError: if an option is not for what the path holds.
    """
    if html is not None:
        check_writable(html.parent)
    if is_calibration(path):
        if base is not None:
            raise ConfigError(
                f"--base is for adapters, whose sizes are told relative to the weights, but {path!r} is a "
                "calibration; leave it out."
            )
        title, listing = "Calibration", _of_calibration(CalibrationResult.load(path), rank, plot)
    else:
        adapter = read_adapter(path)
        if rank is not None:
            raise ConfigError(
                f"--rank is for calibrations, whose ranks are suggested, but {path!r} is an adapter; "
                "leave it out."
            )
        title, listing = "Adapter", _of_adapter(adapter, base, plot)
    if html is not None:
        write_page(listing, html, title=title, subject=path)
        listing.facts["page"] = str(html)
    listing.show(as_json)


def _of_calibration(result: CalibrationResult, rank: int | None, plot: Path | None) -> Listing:
    need, columns = result.need, [Column("layer", "layer"), Column("shape", "out x in", "shape", 2)]
    columns.append(Column("norm", need.norm, ".3g", 1))
    rows: list[dict[str, Any]] = [_measured(result, name) for name in result.readouts]
    facts: dict[str, Any] = {
        "statistic": result.fingerprint.statistic,
        "data": Said(
            f"{result.facts.n_sequences:,} sequences, {result.facts.n_tokens:,} tokens, ended by "
            f"{result.facts.stopped_by}",
            {
                "n_sequences": result.facts.n_sequences,
                "n_tokens": result.facts.n_tokens,
                "stopped_by": result.facts.stopped_by,
            },
        ),
        "loss": result.facts.loss,
    }
    if triplets := result.triplets:
        measured = sum(len(svd.S) for svd in triplets.values()) // len(triplets)
        most = max(1, measured // max(1, need.size(1)))
        rank = rank or max(1, most // 2)
        suggested = suggested_ranks(result, rank)
        rows = [row | _spectrum(result, row["layer"], (rank, most), suggested) for row in rows]
        facts["suggestion"] = Said(
            _most_and_least(suggested, rank), {"rank": rank, "ranks": suggested}
        )
        columns += [
            Column("captured", f"in r {rank}", ".1%"),
            Column("captured_by_all", f"in r {most}", ".1%"),
            Column("effective_rank", "effective rank", ".1f"),
            Column("suggested_rank", "suggested r", "d"),
        ]
        if plot is not None:
            drawn = [
                draw_spectra(result, plot / "spectra.png"),
                draw_rank_map(suggested, plot / "ranks.png", title="suggested rank"),
            ]
            facts["pictures"] = _files(drawn)
    elif rank is not None or plot is not None:
        raise ConfigError(
            f"this calibration holds {need.title}, and --rank and --plot need singular values, as "
            "calibrations of LoRA-GA, LoRA-One and EVA hold them; leave both options out."
        )
    facts["not measured"] = dict(result.failures) or None
    return Listing("", columns, rows, {k: v for k, v in facts.items() if v is not None})


def _measured(result: CalibrationResult, name: str) -> dict[str, Any]:
    out_features, in_features, _ = result.fingerprint.targets[name]
    return {"layer": name, "shape": [out_features, in_features], "norm": result.energy[name] ** 0.5}


def _spectrum(
    result: CalibrationResult, name: str, ranks: tuple[int, int], suggested: Mapping[str, int]
) -> dict[str, Any]:
    readouts, energy = result.readouts[name], result.energy[name]
    captured = [result.need.captured(readouts, r, energy) for r in ranks]
    return {
        "captured": captured[0],
        "captured_by_all": captured[1],
        "effective_rank": effective_rank(readouts["S"]),
        "suggested_rank": suggested.get(name) or suggested[name.rpartition("[")[0]],
        "singular_values": readouts["S"].double().tolist(),
    }


def _of_adapter(adapter: SavedAdapter, base: str | None, plot: Path | None) -> Listing:
    report = _report(adapter.directory)
    weight = weights_of(base, adapter) if base else None
    if weight is not None:
        adapter.check_untouched_base()
    captured = {line["name"]: line["captured_energy"] for line in report.get("modules", ())}
    rows = []
    for name, update in adapter.layers.items():
        S = update.svd().S
        norm = math.hypot(*S.tolist())
        row = {
            "layer": name,
            "shape": [update.B.shape[0], update.A.shape[1]],
            "r": update.r,
            "scaling": adapter.scaling(name),
            "norm": norm,
            "effective_rank": effective_rank(S) if norm > rounding_of(update) else 0.0,
            "captured": captured.get(name),
            "singular_values": S.tolist(),
        }
        if weight is not None:
            row["drift"] = relative_norm(update, weight(name))
        rows.append(row)
    facts = _facts_of_adapter(adapter, report, rows)
    if plot is not None:
        drawn = [draw_rank_map({r["layer"]: r["r"] for r in rows}, plot / "ranks.png")]
        if weight is not None:
            moved = {r["layer"]: r["drift"] for r in rows}
            drawn.append(draw_drift({adapter.directory: moved}, plot / "drift.png"))
        facts["pictures"] = _files(drawn)
    columns = [
        Column("layer", "layer"),
        Column("shape", "out x in", "shape", 3),
        Column("r", "r", "d"),
        Column("scaling", "scaling", ".3g", 2),
        Column("norm", "|sBA|", ".3g", 1),
        Column("effective_rank", "effective rank", ".1f"),
    ]
    columns += [Column("drift", "|sBA| / |W|", ".2%")] if weight is not None else []
    columns += [Column("captured", "captured at start", ".1%")] if captured else []
    return Listing("", columns, rows, {k: v for k, v in facts.items() if v})


def _facts_of_adapter(
    adapter: SavedAdapter, report: Mapping[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    full = [r["layer"] for r in rows if r["r"] > 1 and r["effective_rank"] > _FULL * r["r"]]
    empty = [r["layer"] for r in rows if r["r"] > 1 and 0 < r["effective_rank"] < _EMPTY * r["r"]]
    unmoved = [r["layer"] for r in rows if r["effective_rank"] == 0]
    overwritten = adapter.overwritten_by
    return {
        "started by": report.get("method") or overwritten,
        "base model": adapter.config.base_model_name_or_path,
        "base overwritten": overwritten
        and f"{overwritten} writes into the base: `peft-gradinit convert` frees the adapter of it",
        "could use more rank": layers_told(full),
        "less rank would do": layers_told(empty),
        "without an update": layers_told(unmoved),
        "other tensors": len(adapter.others),
    }


def _report(directory: str) -> Mapping[str, Any]:
    """What the start reported, if the adapter is from this package."""
    try:
        content = read_provenance(directory)
    except GradInitError:
        return {}
    return content.get("report") or {"method": content.get("method")}


def _most_and_least(suggested: Mapping[str, int], rank: int) -> str:
    ordered = sorted(suggested, key=lambda name: -suggested[name])
    most = ", ".join(f"{name} {suggested[name]}" for name in ordered[:3])
    least = ", ".join(f"{name} {suggested[name]}" for name in ordered[::-1][:3])
    return (
        f"at a mean rank of {rank}, most to {most}; least to {least} (all with --json, or let "
        "rank_allocation in the config do it)"
    )


def _files(drawn: Sequence[Path]) -> Said:
    return Said(", ".join(map(str, drawn)), list(map(str, drawn)))
