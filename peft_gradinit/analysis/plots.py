"""Pictures of calibrations, adapters and runs; needs matplotlib, the extra `plots`.

Every `draw_` function writes one PNG and returns its path. The depth of a layer is the first number
in its name; the rest of the name after it is its kind.
"""

import itertools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..calibration import CalibrationResult
from ..errors import ConfigError
from ..files import whole_file
from ..records import BLOCK
from .comparison import LayerComparison

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_SMOOTHING = 10  # steps
_LABELLED_CELLS = 400
"""Largest number of cells with numbers in them; in larger maps they would be too small to read."""
_GREY = "0.5"
_DARK = 0.85
"""Part of the colour map that is dark enough for lines on white."""


def check_available() -> None:
    """Raise `ConfigError` without matplotlib, before long work that ends with a picture."""
    _pyplot()


def is_available() -> bool:
    """Whether pictures can be drawn: matplotlib is an extra."""
    try:
        _pyplot()
    except ConfigError:
        return False
    return True


def draw_spectra(result: CalibrationResult, path: str | os.PathLike[str]) -> Path:
    """Draw singular values over their statistic's norm, in a panel for each kind of layer."""
    kinds: dict[str, list[str]] = {}
    for name, (_, kind) in places_of(result.triplets).items():
        kinds.setdefault(kind, []).append(name)
    figure, panels = _panels(len(kinds), size=(3.0, 2.3), share_y=True)
    colours, deepest = _depth_colours(result.triplets)
    for panel, (kind, names) in zip(panels, kinds.items(), strict=False):
        for name in names:
            S = result.triplets[name].S.cpu().double()
            share = (S / max(result.energy[name], 1e-300) ** 0.5).tolist()
            numbers = range(1, len(share) + 1)
            panel.semilogy(numbers, share, color=colours[name], lw=1.2, alpha=0.85)
        panel.set_title(kind, fontsize=8)
        _whole_numbers(panel)
        panel.grid(alpha=0.3, which="both", lw=0.4)
    title = f"Singular values of the {result.fingerprint.statistic}, a line for each layer"
    figure.suptitle(title, fontsize=10)
    figure.supxlabel("number of the singular value", fontsize=9)
    figure.supylabel(f"share of the norm of the {result.fingerprint.statistic}", fontsize=9)
    _depth_bar(figure, panels, deepest)
    return _saved(figure, path)


def draw_rank_map(
    ranks: Mapping[str, int], path: str | os.PathLike[str], *, title: str = "rank"
) -> Path:
    """Draw the ranks by depth, from left to right, and kind of layer, from top to bottom."""
    figure = _map({name: float(r) for name, r in ranks.items()}, title, "d")
    figure.suptitle(f"{title.capitalize()} of every layer", fontsize=10)
    return _saved(figure, path)


def draw_drift(drifts: Mapping[str, Mapping[str, float]], path: str | os.PathLike[str]) -> Path:
    """Draw how far adapters have moved every layer from the base, `|dW| / |W|`.

    One adapter is drawn as a map. Several (checkpoints of a run, or different runs) are lines over
    the depth, with the mean of the layers at each depth.
    """
    if len(drifts) == 1:
        (drift,) = drifts.values()
        figure = _map({n: 100 * value for n, value in drift.items()}, "|dW| / |W|, %", ".2g")
        figure.suptitle("How far training moved every layer", fontsize=10)
        return _saved(figure, path)
    figure, (panel,) = _panels(1, size=(6.4, 3.6))
    for label, layers in drifts.items():
        by_depth: dict[int, list[float]] = {}
        places = places_of(layers)
        for name, value in layers.items():
            by_depth.setdefault(places[name][0] or 0, []).append(value)
        depths = sorted(by_depth)
        means = [100 * sum(by_depth[d]) / len(by_depth[d]) for d in depths]
        panel.plot(depths, means, marker="o", ms=3, label=label)
    panel.set(xlabel="block", ylabel="|dW| / |W|, mean of the layers, %")
    panel.set_title("How far training moved the blocks", fontsize=10)
    _whole_numbers(panel)
    panel.set_ylim(bottom=0)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)
    return _saved(figure, path)


def draw_angles(
    lines: Sequence[LayerComparison],
    path: str | os.PathLike[str],
    *,
    names: tuple[str, str] = ("first", "second"),
) -> Path:
    """Draw the principal angles between the input and output spaces of two adapters or results."""
    sides = [s for s in ("input", "output") if any(getattr(x, f"{s}_angles") for x in lines)]
    if not sides:
        raise ConfigError(
            f"there are no angles between {names[0]} and {names[1]}: in no layer do both have a space, "
            "as where all B are zero; leave the picture out."
        )
    figure, panels = _panels(len(sides), size=(4.4, 3.4))
    colours, deepest = _depth_colours(line.name for line in lines)
    for panel, side in zip(panels, sides, strict=False):
        for line in lines:
            degrees = [math.degrees(a) for a in getattr(line, f"{side}_angles")]
            numbers = range(1, len(degrees) + 1)
            panel.plot(numbers, degrees, color=colours[line.name], lw=1, alpha=0.8)
        panel.set(title=f"{side} spaces", xlabel="principal angle, ascending", ylim=(-2, 92))
        panel.set_yticks(range(0, 91, 15))
        _whole_numbers(panel)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("degrees")
    figure.suptitle(f"Angles between the spaces of {names[0]} and {names[1]}", fontsize=10)
    _depth_bar(figure, panels, deepest)
    return _saved(figure, path)


def draw_losses(
    runs: Mapping[str, Sequence[tuple[float, float]]],
    path: str | os.PathLike[str],
    *,
    label: str = "training loss",
) -> Path:
    """Draw `(step, loss)` by run as lines, the thickest for the first run, before its baselines."""
    figure, (panel,) = _panels(1, size=(6.4, 3.8))
    smoothed = False
    for i, (name, points) in enumerate(runs.items()):
        steps, losses = [p[0] for p in points], [p[1] for p in points]
        smooth = _running_mean(losses, min(_SMOOTHING, max(1, len(losses) // 5)))
        smoothed = smoothed or smooth != losses
        (line,) = panel.plot(steps, smooth, label=name, lw=2.2 if i == 0 else 1.4, zorder=9 - i)
        panel.plot(steps, losses, color=line.get_color(), alpha=0.2, lw=0.7)
    panel.set(xlabel="step", ylabel=f"{label} (nats)")
    if smoothed:
        panel.set_title("Running means; pale: every logged value", fontsize=10)
    _whole_numbers(panel)
    panel.grid(alpha=0.3)
    panel.legend(frameon=False, fontsize=8)
    return _saved(figure, path)


def _map(values: Mapping[str, float], title: str, style: str) -> "Figure":
    """A heat map by depth and kind of layer; layers without a depth are in the first column."""
    places = places_of(values)
    columns = sorted({depth for depth, _ in places.values()}, key=lambda d: -1 if d is None else d)
    kinds = list(dict.fromkeys(kind for _, kind in places.values()))
    grid = [[math.nan] * len(columns) for _ in kinds]
    for name, value in values.items():
        depth, kind = places[name]
        grid[kinds.index(kind)][columns.index(depth)] = value
    size = (2.4 + 0.42 * len(columns), 1.1 + 0.3 * len(kinds))
    figure, (panel,) = _panels(1, size=(min(size[0], 24), size[1]))
    highest = max(values.values(), default=1) or 1
    image = panel.imshow(grid, aspect="auto", cmap="viridis", vmin=0, vmax=highest)
    panel.set_yticks(range(len(kinds)), kinds, fontsize=7)
    panel.set_xticks(range(len(columns)), ["none" if c is None else str(c) for c in columns])
    panel.tick_params(axis="x", labelsize=7)
    panel.set_xlabel("block", fontsize=8)
    if len(values) <= _LABELLED_CELLS:
        _label_cells(panel, grid, highest, style)
    bar = figure.colorbar(image, ax=panel)
    bar.set_label(title, fontsize=8)
    bar.ax.tick_params(labelsize=7)
    return figure


def _label_cells(panel: "Axes", grid: list[list[float]], highest: float, style: str) -> None:
    for y, row in enumerate(grid):
        for x, value in enumerate(row):
            if not math.isnan(value):
                colour = "black" if value > 0.6 * highest else "white"
                text = format(int(value) if style == "d" else value, style)
                panel.text(x, y, text, ha="center", va="center", fontsize=6, color=colour)


def places_of(names: Iterable[str]) -> dict[str, tuple[int | None, str]]:
    """Depth and kind of every layer of a model.

    The kind is the name after the number of the block. If blocks are in several stacks, such as an encoder
    and a decoder, it begins with where those differ.
    """
    blocks = {name: BLOCK.search(name) for name in names}
    stacks = {name[: block.start()] for name, block in blocks.items() if block}
    sides = dict(zip(stacks, _differing([stack.split(".") for stack in stacks]), strict=True))
    places: dict[str, tuple[int | None, str]] = {}
    for name, block in blocks.items():
        if block is None:
            places[name] = None, name
            continue
        stack = name[: block.start()]
        kind = " ".join(filter(None, (sides[stack], name[block.end() + 1 :])))
        places[name] = int(block[1]), kind or stack
    return places


def _differing(paths: list[list[str]]) -> list[str]:
    """The paths without what they all begin and end with."""
    if len(paths) < 2:
        return [""] * len(paths)
    start = _n_alike(paths)
    end = _n_alike([path[start:][::-1] for path in paths])
    return [".".join(path[start : len(path) - end]) for path in paths]


def _n_alike(paths: list[list[str]]) -> int:
    """How many parts all of them begin with."""
    parts = zip(*paths, strict=False)
    return len(list(itertools.takewhile(lambda found: len(set(found)) == 1, parts)))


def _panels(
    n: int, *, size: tuple[float, float], share_y: bool = False
) -> "tuple[Figure, list[Axes]]":
    columns = min(n, 4)
    rows = -(-n // columns)
    options: Any = {"squeeze": False, "sharey": share_y, "layout": "constrained"}
    figsize = (size[0] * columns, size[1] * rows)
    figure, axes = _pyplot().subplots(rows, columns, figsize=figsize, **options)
    panels = list(axes.flat)
    for panel in panels:
        panel.tick_params(labelsize=8)
    for unused in panels[n:]:
        unused.axis("off")
    return figure, panels[:n]


def _pyplot() -> Any:
    """`matplotlib.pyplot`, without a display."""
    try:
        import matplotlib
    except ImportError as error:
        raise ConfigError(
            "pictures need matplotlib; install the extra: pip install 'peft_gradinit[plots]'."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _depth_colours(names: Iterable[str]) -> tuple[dict[str, Any], int]:
    """A colour for every layer by its depth, and the largest depth."""
    depths = {name: depth for name, (depth, _) in places_of(names).items()}
    deepest = max((depth or 0 for depth in depths.values()), default=0)
    colours = _pyplot().get_cmap("viridis")
    return {
        name: _GREY if depth is None else colours(_DARK * depth / max(1, deepest))
        for name, depth in depths.items()
    }, deepest


def _depth_bar(figure: "Figure", panels: "list[Axes]", deepest: int) -> None:
    if deepest:
        pyplot = _pyplot()
        # The same colours as the lines: the map goes on beyond the last block.
        norm = pyplot.Normalize(0, deepest / _DARK)
        scale = pyplot.cm.ScalarMappable(norm, pyplot.get_cmap("viridis"))
        whole = pyplot.MaxNLocator(integer=True)
        bar = figure.colorbar(scale, ax=panels, label="block", fraction=0.03, ticks=whole)
        bar.ax.set_ylim(0, deepest)


def _whole_numbers(panel: "Axes") -> None:
    panel.xaxis.set_major_locator(_pyplot().MaxNLocator(integer=True))


def _running_mean(values: list[float], window: int) -> list[float]:
    means = []
    for i in range(len(values)):
        part = values[max(0, i - window + 1) : i + 1]
        means.append(sum(part) / len(part))
    return means


def _saved(figure: "Figure", path: str | os.PathLike[str]) -> Path:
    with whole_file(path) as beside:
        figure.savefig(beside, dpi=150, format="png")
    _pyplot().close(figure)
    return Path(path)
