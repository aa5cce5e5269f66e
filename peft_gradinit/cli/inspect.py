"""`peft-gradinit inspect`: what a calibration found, or what an adapter holds."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from ..calibration import CalibrationResult
from ..errors import GradInitError
from ..linalg import effective_rank
from ..plots import draw_drift, draw_rank_map, draw_spectra
from ..saved import SavedAdapter, read_adapter, relative_norm, suggested_ranks
from ..tuners import read_provenance
from . import options
from .bases import weights_of
from .output import Column, Listing

_FULL, _EMPTY = 0.8, 0.3
"""Effective rank over `r` above which a layer could use more, and below which less would do."""


def inspect(
    path: Annotated[
        str, typer.Argument(help="A calibration (file or folder) or an adapter (folder, Hub name).")
    ],
    base: options.Base = None,
    rank: Annotated[
        int | None,
        typer.Option(
            min=1, help="Mean rank that the suggestions share out. Default: that calibrated for."
        ),
    ] = None,
    plot: options.Plot = None,
    as_json: options.AsJson = False,
) -> None:
    """Show a calibration or an adapter layer by layer, and which layers deserve rank.

    Of a **calibration**: the norm of every layer's statistic, how much of its energy the leading
    singular values capture, and ranks that would share the same sum better. With --plot: spectra
    and a map of the suggested ranks.

    Of an **adapter**: size, effective rank and energy captured at the start of every layer. With
    --base, sizes are relative to the weights. With --plot: a map of the ranks and, with --base, of
    how far every layer has moved.

        peft-gradinit inspect out/calibration --plot out/pictures
    """
    if options.is_calibration(path):
        listing = _of_calibration(CalibrationResult.load(path), rank, plot)
    else:
        adapter = read_adapter(path)
        listing = _of_adapter(adapter, base, plot)
    listing.show(as_json)


def _of_calibration(result: CalibrationResult, rank: int | None, plot: Path | None) -> Listing:
    gradients = result.fingerprint.statistic == "gradient"
    measured = min((len(svd.S) for svd in result.triplets.values()), default=0)
    rank = rank or max(1, measured // 2)
    suggested = suggested_ranks(result, rank)
    rows = [_layer_of_calibration(result, name, rank, suggested) for name in result.triplets]
    facts: dict[str, Any] = {
        "statistic": result.fingerprint.statistic,
        "data": f"{result.facts.n_sequences:,} sequences, {result.facts.n_tokens:,} tokens, ended "
        f"by {result.facts.stopped_by}",
        "loss": result.facts.loss,
        "suggestion": _most_and_least(suggested, rank),
        "not measured": dict(result.failures) or None,
    }
    if plot is not None:
        facts["pictures"] = ", ".join((
            str(draw_spectra(result, plot / "spectra.png")),
            str(draw_rank_map(suggested, plot / "ranks.png", title="suggested rank")),
        ))
    columns = (
        Column("layer", "layer"),
        Column("shape", "out x in"),
        Column("norm", "|G|" if gradients else "std", ".3g"),
        Column("captured", f"in {rank}", ".1%"),
        Column("captured_by_all", f"in {measured}", ".1%"),
        Column("effective_rank", "effective rank", ".1f"),
        Column("suggested_rank", "suggested r", "d"),
    )
    return Listing("", columns, rows, {k: v for k, v in facts.items() if v is not None})


def _layer_of_calibration(
    result: CalibrationResult, name: str, rank: int, suggested: Mapping[str, int]
) -> dict[str, Any]:
    S = result.triplets[name].S.double()
    energy, squares = result.energy[name], S.square()
    out_features, in_features, _ = result.fingerprint.targets[name]
    return {
        "layer": name,
        "shape": f"{out_features} x {in_features}",
        "norm": energy**0.5,
        "captured": min(1.0, squares[:rank].sum().item() / energy),
        "captured_by_all": min(1.0, squares.sum().item() / energy),
        "effective_rank": effective_rank(S),
        "suggested_rank": suggested[name],
        "singular_values": S.tolist(),
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
        row = {
            "layer": name,
            "shape": f"{update.B.shape[0]} x {update.A.shape[1]}",
            "r": update.r,
            "scaling": adapter.scaling(name),
            "norm": math.hypot(*S.tolist()),
            "effective_rank": effective_rank(S),
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
        facts["pictures"] = ", ".join(map(str, drawn))
    columns = [
        Column("layer", "layer"),
        Column("shape", "out x in"),
        Column("r", "r", "d"),
        Column("scaling", "scaling", ".3g"),
        Column("norm", "|sBA|", ".3g"),
        Column("effective_rank", "effective rank", ".1f"),
    ]
    columns += [Column("drift", "|sBA| / |W|", ".2%")] if weight is not None else []
    columns += [Column("captured", "captured at start", ".1%")] if captured else []
    return Listing("", columns, rows, {k: v for k, v in facts.items() if v})


def _facts_of_adapter(
    adapter: SavedAdapter, report: Mapping[str, Any], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    full = [r["layer"] for r in rows if r["r"] > 1 and r["effective_rank"] > _FULL * r["r"]]
    empty = [r["layer"] for r in rows if r["r"] > 1 and r["effective_rank"] < _EMPTY * r["r"]]
    overwritten = adapter.overwritten_by
    return {
        "started by": report.get("method") or overwritten,
        "base model": adapter.config.base_model_name_or_path,
        "base overwritten": overwritten
        and f"{overwritten} writes into the base: `peft-gradinit convert` frees the adapter of it",
        "could use more rank": _shortened(full),
        "less rank would do": _shortened(empty),
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


def _shortened(names: list[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{len(names)} layers: {shown}{', …' if len(names) > 4 else ''}" if names else ""
