"""The picture on the card of an adapter: where ranks went, and what the start leaves out."""

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from ..files import whole_file

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Of the palette of Okabe and Ito, which colour-blind people tell apart."""
_MARKERS = ("o", "s", "^", "D")
_LEAST = 1e-6
"""What is not captured is drawn down to here; less is rounding."""
_LABELLED_CELLS = 300
"""Largest number of cells with numbers in them."""

BLOCK = re.compile(r"(?:^|\.)(\d+)(?=\.|$)")
"""The first number in a layer's name, which is the index of its block."""


def draw_layers(
    path: Path, ranks: Mapping[str, int], energy: Mapping[str, float | None], title: str
) -> bool:
    """Draw where the ranks went (if they differ) and what the start leaves out, as a PNG.

    Ranks are a map, kinds of layers over blocks. What is left out is 1 - the captured energy on a
    log axis, where layers that capture 99 % and 99.9 % are apart; each kind is a line over the
    blocks. Nothing is drawn if all layers are alike or matplotlib is not installed; the result says
    whether there is a picture.
    """
    panels: list[tuple[Any, Mapping[str, float]]] = []
    if len(set(ranks.values())) > 1:
        panels.append((_draw_ranks, ranks))
    if known := {n: max(1 - value, _LEAST) for n, value in energy.items() if value is not None}:
        panels.append((_draw_left_out, known))
    if not panels:
        return False
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        return False
    series = [_series(values) for _, values in panels]
    n_kinds, n_blocks = len(series[0]), max(len(points) for s in series for points in s.values())
    size = (min(4.4 + 0.12 * n_blocks, 9.0) * len(panels), max(2.8, 1.6 + 0.24 * n_kinds))
    figure = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (draw, _), points in zip(axes, panels, series, strict=True):
        draw(axis, points)
        axis.set_xlabel("block", fontsize=9)
        axis.tick_params(labelsize=8)
    figure.suptitle(title, fontsize=10)
    # No metadata: it would name the version of matplotlib and change with it.
    with whole_file(path) as beside:
        figure.savefig(beside, dpi=120, format="png", metadata={"Software": None})
    return True


_Points = Mapping[str, list[tuple[int, float]]]


def _draw_ranks(axis: Any, series: _Points) -> None:
    """A cell for each kind of layer and block; the more rank, the darker."""
    blocks = sorted({block for points in series.values() for block, _ in points})
    grid = [[dict(points).get(block, math.nan) for block in blocks] for points in series.values()]
    highest = max(r for points in series.values() for _, r in points) or 1
    image = axis.imshow(grid, aspect="auto", cmap="cividis_r", vmin=0, vmax=highest)
    axis.set_yticks(range(len(series)), series)
    step = -(-len(blocks) // 16)
    axis.set_xticks(range(0, len(blocks), step), [str(block) for block in blocks[::step]])
    if len(blocks) * len(series) <= _LABELLED_CELLS:
        for y, row in enumerate(grid):
            for x, r in enumerate(row):
                if not math.isnan(r):
                    colour = "white" if r > 0.55 * highest else "black"
                    axis.text(x, y, f"{r:g}", ha="center", va="center", fontsize=7, color=colour)
    axis.set_title("rank", fontsize=9)
    axis.figure.colorbar(image, ax=axis, pad=0.02).ax.tick_params(labelsize=7)


def _draw_left_out(axis: Any, series: _Points) -> None:
    """A line for each kind of layer, named beside the axes."""
    for i, (kind, points) in enumerate(series.items()):
        axis.plot(
            *zip(*points, strict=True),
            label=kind,
            color=_COLOURS[i % len(_COLOURS)],
            marker=_MARKERS[i // len(_COLOURS) % len(_MARKERS)],
            markersize=4,
            linewidth=1.5,
        )
    axis.set_yscale("log")
    low, high = axis.get_ylim()
    if high / low < 10:  # a decade, so that the axis has a labelled tick
        middle = math.sqrt(low * high)
        axis.set_ylim(middle / 10**0.6, middle * 10**0.6)
    axis.yaxis.set_major_formatter(_percent)
    axis.yaxis.set_minor_formatter(
        lambda value, _: _percent(value) if f"{value:e}"[0] in "25" else ""
    )
    axis.tick_params(which="minor", labelsize=7)
    axis.set_title("energy not captured by the start", fontsize=9)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", which="both", color="#dddddd", linewidth=0.5)
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False, fontsize=8)


def _percent(value: float, _: Any = None) -> str:
    return f"{100 * value:.4f}".rstrip("0").rstrip(".") + " %"


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
