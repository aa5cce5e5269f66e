"""The picture on the card of an adapter: ranks and captured energy by block and kind of layer."""

import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import whole_file

_COLOURS = ("#4269d0", "#efb118", "#ff725c", "#6cc5b0", "#3ca951", "#ff8ab7", "#a463f2", "#97bbf5")
_MARKERS = ("o", "s", "^")

BLOCK = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
"""The first number in a layer's name, which is the index of its block."""


def draw_layers(
    path: Path, ranks: Mapping[str, int], energy: Mapping[str, float | None], title: str
) -> bool:
    """Draw ranks (if they differ) and captured energies, 0 to 1 by layer, as a PNG.

    Each kind of layer is a line over the blocks. Nothing is drawn if all layers are alike or
    matplotlib is not installed; the result says whether there is a picture.
    """
    panels = []
    if len(set(ranks.values())) > 1:
        panels.append(("rank", ranks))
    if known := {name: value for name, value in energy.items() if value is not None}:
        panels.append(("captured energy", known))
    if not panels:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(4.2 * len(panels) + 1.6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (label, values) in zip(axes, panels, strict=True):
        _draw(axis, label, values)
    handles = dict(zip(*reversed(axes[0].get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside right center", frameon=False, fontsize=8
    )
    figure.suptitle(title, fontsize=10)
    # No metadata: it would name the version of matplotlib and change with it.
    with whole_file(path) as beside:
        figure.savefig(beside, dpi=120, format="png", metadata={"Software": None})
    return True


def _draw(axis: Any, label: str, values: Mapping[str, float]) -> None:
    for i, (kind, points) in enumerate(_series(values).items()):
        axis.plot(
            *zip(*points, strict=True),
            label=kind,
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[i // len(_COLOURS) % len(_MARKERS)],
            markersize=max(3.0, 5.5 - 0.4 * i),  # lines that coincide stay visible
            linewidth=max(1.2, 2.8 - 0.25 * i),
        )
    axis.set(xlabel="block", ylabel=label)
    axis.set_ylim(bottom=0, top=1.02 if label == "captured energy" else None)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    axis.tick_params(labelsize=8)


def _series(values: Mapping[str, float]) -> dict[str, list[tuple[int, float]]]:
    """Points `(block, value)` by kind of layer.

    The block is the first number in a layer's name, and the kind is the name without its numbers.
    Layers of one kind in one block, such as experts, are averaged.
    """
    by_kind: dict[str, dict[int, list[float]]] = {}
    for name, value in values.items():
        block = BLOCK.search(name)
        kind = re.sub(r"^\d+\.|\.\d+(?=\.|$)", "", name)
        by_kind.setdefault(kind, {}).setdefault(int(block[1]) if block else 0, []).append(value)
    return {
        _label(kind, by_kind): [(i, statistics.fmean(group)) for i, group in sorted(points.items())]
        for kind, points in by_kind.items()
    }


def _label(kind: str, kinds: Iterable[str]) -> str:
    """A kind's name cut to its last two parts, or to as many as tell it from the other kinds."""
    parts = kind.split(".")
    others = [f".{other}" for other in kinds if other != kind]
    for n in range(2, len(parts)):
        label = ".".join(parts[-n:])
        if not any(other.endswith(f".{label}") for other in others):
            return label
    return kind
