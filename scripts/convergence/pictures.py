"""The pictures of a study: a panel for each method, against LoRA in grey, and 95 % intervals."""

import textwrap
from collections.abc import Callable
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .methods import METHODS
from .study import BASELINE, SHORTER
from .summary import Summary, TaskSummary, half_interval

COLUMNS = 5
TITLE_WIDTH = 26
GREY = "0.45"
OURS, OTHERS = "#0072B2", "#D55E00"
"""Of the palette of Okabe and Ito, which colour-blind people tell apart."""

LEGEND_WIDTH = 7.2
"""Inches that the legend needs in a line; a figure of few panels is as wide."""

Draw = Callable[[TaskSummary, str, Axes], None]


def draw(task: TaskSummary, folder: Path) -> list[Path]:
    """Draw what the learning rate does to a task, and how its losses fall.

    Args:
        task: its summary.
        folder: to write to.

    Returns:
        The files, `rates_TASK.png` and `curves_TASK.png`.
    """
    what = f"{task.task}: {task.about}"
    rates = _figure(task, draw_rates, ("learning rate", "test loss at the end (nats)"))
    rates.suptitle(f"Loss by learning rate\n{what}", fontsize=11)
    curves = _figure(task, draw_curves, ("steps, calibration included", "test loss (nats)"))
    curves.suptitle(f"Loss by step, each method at its best rate\n{what}", fontsize=11)
    files = []
    for name, figure in (("rates", rates), ("curves", curves)):
        files.append(folder / f"{name}_{task.task}.png")
        figure.savefig(files[-1], dpi=100)
        plt.close(figure)
    return files


def _figure(task: TaskSummary, draw_panel: Draw, labels: tuple[str, str]) -> plt.Figure:
    methods = [method for method in task.in_order() if method != BASELINE]
    columns = min(COLUMNS, max(1, len(methods)))
    rows = max(1, -(-len(methods) // columns))
    size = (max(2.4 * columns, LEGEND_WIDTH), 1.9 * rows + 1.3)
    figure, grid = plt.subplots(
        rows, columns, figsize=size, sharex=True, sharey=True, layout="constrained", squeeze=False
    )
    panels = list(grid.flat)
    for method, panel in zip(methods, panels, strict=False):
        draw_panel(task, method, panel)
        info = METHODS[method]
        title = "\n".join(textwrap.wrap(info.title, TITLE_WIDTH))
        panel.set_title(title, fontsize=9, weight="bold" if info.ours else "normal")
        panel.grid(alpha=0.25, lw=0.4)
        panel.spines[["top", "right"]].set_visible(False)
        panel.tick_params(labelsize=7)
    for panel in panels[len(methods) :]:
        panel.axis("off")
    for panel, below in zip(panels, panels[columns:] + [None] * columns, strict=False):
        if below is not None and not below.axison:
            panel.tick_params(labelbottom=True)
    for panel in panels[max(0, len(methods) - columns) : len(methods)]:
        panel.set_xlabel(labels[0], fontsize=8)
    figure.supylabel(labels[1], fontsize=9)
    figure.legend(
        handles=_legend(draw_panel is draw_rates),
        loc="outside lower center",
        ncols=5,
        fontsize=8,
        frameon=False,
    )
    return figure


def _legend(of_rates: bool) -> list[Line2D]:
    entries = [
        Line2D([], [], color=GREY, lw=2, label="LoRA"),
        Line2D([], [], color=OURS, marker="o", ms=3, label="of this package"),
        Line2D([], [], color=OTHERS, marker="o", ms=3, label="others"),
        Line2D(
            [], [], color="k", marker="|", ms=9, ls="", label="95 % interval of the reported seeds"
        ),
    ]
    if of_rates:
        entries.append(
            Line2D([], [], color="w", marker="*", ms=10, mec="k", ls="", label="suggested rate")
        )
    return entries


def draw_rates(task: TaskSummary, method: str, axes: Axes) -> None:
    """Final loss against the learning rate: how much a method depends on it."""
    bottom, top = _limits(task, 4)
    for name in (BASELINE, method):
        summary, colour = task.methods[name], _colour(name)
        points = [(lr, loss) for lr, loss in summary.search.items() if loss is not None]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", ms=2.5, lw=1.4)
        half = half_interval(summary.losses)
        axes.errorbar(summary.lr, summary.loss, half, fmt="_", color=colour, capsize=2.5, lw=1.4)
        if summary.suggested_lr is not None and summary.suggested_loss is not None:
            at = summary.suggested_lr, summary.suggested_loss
            axes.plot(*at, "*", color=colour, ms=9, mec="k")
    axes.set(xscale="log", ylim=(bottom, top))
    _say_if_outside(task.methods[method], axes, top)


def draw_curves(task: TaskSummary, method: str, axes: Axes) -> None:
    """Test loss against the steps, each at its best learning rate."""
    bottom, top = _limits(task, 5)
    half = half_interval(task.methods[BASELINE].losses)
    axes.axhspan(task.aim - half, task.aim + half, color=GREY, alpha=0.2, lw=0)
    axes.axvline(SHORTER * task.steps, color="0.6", lw=0.8, ls=":")
    for name in (BASELINE, method):
        summary, colour = task.methods[name], _colour(name)
        steps, losses = zip(*summary.curve, strict=True)
        axes.plot(steps, losses, color=colour, lw=1.4, marker="o", ms=2)
        if summary.spread:
            low = [loss - half for loss, half in zip(losses, summary.spread, strict=True)]
            high = [loss + half for loss, half in zip(losses, summary.spread, strict=True)]
            axes.fill_between(steps, low, high, color=colour, alpha=0.2, lw=0)
        end = half_interval(summary.losses)
        axes.errorbar(steps[-1], summary.loss, end, color=colour, capsize=2.5, lw=1.4)
    axes.set_ylim(bottom, top)
    _say_if_outside(task.methods[method], axes, top)


def _colour(method: str) -> str:
    if method == BASELINE:
        return GREY
    return OURS if METHODS[method].ours else OTHERS


def _limits(task: TaskSummary, width: float) -> tuple[float, float]:
    """From below the best loss to above LoRA's: rates that are far off would hide the rest."""
    found = task.methods.values()
    losses = (loss for s in found for loss in (s.loss, s.suggested_loss, *s.search.values()))
    best = min(loss for loss in losses if loss is not None)
    room = max(task.aim - best, 0.02 * task.aim)
    return best - 0.15 * room, task.aim + width * room


def _say_if_outside(summary: Summary, axes: Axes, top: float) -> None:
    if summary.loss > top:
        text = f"outside: {summary.loss:.3f}"
        axes.text(
            0.5, 0.9, text, transform=axes.transAxes, ha="center", fontsize=8, backgroundcolor="w"
        )
