"""The table and the pictures of a study, from its summaries."""

import math
import statistics
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from .methods import METHODS
from .study import BASELINE, SHORTER
from .summary import Summary, TaskSummary

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantiles of Student's t for a 95 % interval of the mean, by the number of runs."""
COLUMNS = (
    "learning rate",
    "rates within 2 %",
    "test loss",
    "accuracy",
    "steps to LoRA's loss",
    f"loss of {SHORTER:.0%} of the steps",
    "suggested rate: loss",
    "seconds to LoRA's loss",
    "loss on old data",
    "step",
    "memory",
)
OVERVIEW_COLUMNS = ("loss", "rate", "range", f"{SHORTER:.0%} of the steps", "suggested rate")
LEGEND_SIZE = 7


def interval(values: list[float], digits: int = 3) -> str:
    """Mean and half of its 95 % interval."""
    mean = statistics.mean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return f"{mean:.{digits}f}"
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(task: TaskSummary) -> str:
    """One task as a Markdown table."""
    rows = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method, summary in task.in_order().items():
        name = METHODS[method].title
        name = f"**{name}**" if METHODS[method].ours else name
        rows.append(f"| {name} | {' | '.join(_cells(task, summary))} |")
    return "\n".join(rows)


def _cells(task: TaskSummary, summary: Summary) -> list[str]:
    low, high = summary.usable
    return [
        f"{summary.lr:g}",
        f"{low:.1e} to {high:.1e} ({summary.breadth:.1f})",
        interval(summary.losses),
        interval(summary.accuracies),
        _steps_to_aim(summary, task.steps),
        _at_rate(summary.short_lr, summary.short_loss, task.aim),
        _at_rate(summary.suggested_lr, summary.suggested_loss, task.aim),
        _seconds_to_aim(summary),
        f"{statistics.mean(summary.forgetting):+.2f}" if summary.forgetting else "-",
        *(_cost(summary, task, name) for name in ("step_seconds", "training_mib")),
    ]


def median_reach(summary: Summary) -> float:
    """Median over the seeds of the steps to LoRA's loss; infinite if most seeds never get there."""
    return statistics.median(math.inf if n is None else n for n in summary.reach)


def _steps_to_aim(summary: Summary, whole: int) -> str:
    steps = median_reach(summary)
    return f"{steps:.0f} ({steps / whole:.0%})" if math.isfinite(steps) else "-"


def _next_to(loss: float, aim: float) -> str:
    return f"{loss:.3f} ({loss / aim - 1:+.1%})"


def _at_rate(lr: float | None, loss: float | None, aim: float) -> str:
    return "-" if loss is None else f"{lr:g}: {_next_to(loss, aim)}"


def _seconds_to_aim(summary: Summary) -> str:
    steps, costs = median_reach(summary), summary.costs
    if not costs or not math.isfinite(steps):
        return "-"
    trained = steps - summary.start_steps
    return f"{costs['start_seconds'] + trained * costs['step_seconds']:.1f}"


def _cost(summary: Summary, task: TaskSummary, name: str) -> str:
    of_lora = task.methods[BASELINE].costs
    return f"{summary.costs[name] / of_lora[name]:.2f}" if summary.costs and of_lora else "-"


def aims(task: TaskSummary) -> str:
    """What became of the two aims, in two lines."""
    ours = {m: s for m, s in task.in_order().items() if METHODS[m].ours}
    baseline, lines = task.methods[BASELINE], []
    short = {m: s.short_loss for m, s in ours.items() if s.short_loss is not None}
    if short:
        best, final = min(short, key=lambda m: short[m]), min(ours, key=lambda m: ours[m].loss)
        lines.append(
            f"Speed: of ours, the best run of {SHORTER:.0%} of the steps ({METHODS[best].title}) ends "
            f"at {_next_to(short[best], task.aim)} of LoRA's {task.aim:.3f}, the best whole run "
            f"({METHODS[final].title}) at {_next_to(ours[final].loss, task.aim)}."
        )
    known = [
        f"{METHODS[m].title} {s.suggested_loss / task.aim - 1:+.1%}"
        for m, s in {BASELINE: baseline, **ours}.items()
        if s.suggested_loss is not None
    ]
    widest = max(ours, key=lambda m: ours[m].breadth, default=None)
    if widest is not None:
        lines.append(
            f"Ease: at the suggested rate {', '.join(known)}; widest usable range "
            f"{ours[widest].breadth:.1f} ({METHODS[widest].title}), LoRA's {baseline.breadth:.1f}."
        )
    return "\n".join(f"- {line}" for line in lines)


def overview(tasks: list[TaskSummary]) -> str:
    """The methods as short Markdown tables, one a task; for `docs/benchmarks.md`."""
    return "\n\n".join(_short_table(task) for task in tasks)


def _short_table(task: TaskSummary) -> str:
    head = ["| " + " | ".join((task.task, *OVERVIEW_COLUMNS)) + " |"]
    head.append("|---" * (len(OVERVIEW_COLUMNS) + 1) + "|")
    rows = []
    for method, summary in task.in_order().items():
        info = METHODS[method]
        name = f"**{info.title}**" if info.ours else info.title
        rows.append(f"| {name} | {' | '.join(_short_cells(task, summary))} |")
    return "\n".join(head + rows)


def _short_cells(task: TaskSummary, summary: Summary) -> list[str]:
    def relative(loss: float | None) -> str:
        return "" if loss is None else f"{loss / task.aim - 1:+.1%}"

    return [
        interval(summary.losses),
        f"{summary.lr:.1e}",
        f"{summary.breadth:.1f}",
        relative(summary.short_loss),
        relative(summary.suggested_loss),
    ]


def markdown(tasks: list[TaskSummary]) -> str:
    """The tables of all tasks."""
    return "\n\n".join(f"**{t.task}**, {t.about}:\n\n{table(t)}\n\n{aims(t)}" for t in tasks)


def write_report(tasks: list[TaskSummary], folder: Path) -> str:
    """Write `report.md` and the pictures; return the Markdown.

    Args:
        tasks: the summaries.
        folder: to write to.

    Returns:
        What `report.md` says.
    """
    text = markdown(tasks)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    for name, draw in (("rates", draw_rates), ("curves", draw_curves)):
        size = (6 * len(tasks), 5)
        figure, axes = plt.subplots(
            1, len(tasks), figsize=size, layout="constrained", squeeze=False
        )
        for task, panel in zip(tasks, axes[0], strict=True):
            draw(task, panel)
            panel.set_title(f"{task.task}: {task.about}", fontsize=9)
            panel.grid(alpha=0.3, which="both", lw=0.4)
        handles, labels = axes[0][0].get_legend_handles_labels()
        figure.legend(handles, labels, fontsize=LEGEND_SIZE, ncols=9, loc="outside lower center")
        figure.savefig(folder / f"{name}.png", dpi=90)
        plt.close(figure)
    return text


def draw_rates(task: TaskSummary, axes: Axes) -> None:
    """Final loss against the learning rate: how much a method depends on it."""
    for method, summary in task.in_order().items():
        points = [(lr, loss) for lr, loss in summary.search.items() if loss is not None]
        axes.plot(*zip(*points, strict=True), **_style(method))
        if summary.suggested_losses:
            rate, loss = summary.suggested_lr, summary.suggested_loss
            axes.plot(rate, loss, "*", color=_style(method)["color"], markersize=11, mec="k")
    best = min(loss for s in task.methods.values() for loss in s.search.values() if loss)
    axes.set(xscale="log", xlabel="learning rate (stars: suggested)", ylabel="test loss at the end")
    # Rates that are far too low or high would hide the others.
    axes.set_ylim(best * 0.99, task.aim + 4 * (task.aim - best))


def draw_curves(task: TaskSummary, axes: Axes) -> None:
    """Test loss against the steps, calibration included, each at its best learning rate."""
    for method, summary in task.in_order().items():
        axes.plot(*zip(*summary.curve, strict=True), **_style(method))
    axes.axhline(task.aim, color="0.6", lw=0.8, ls=":")
    axes.axvline(SHORTER * task.steps, color="0.6", lw=0.8, ls=":")
    best = min(s.loss for s in task.methods.values())
    axes.set_ylim(best * 0.99, task.aim + 5 * (task.aim - best))
    axes.set(xlabel="steps, calibration included", ylabel="test loss")


def _style(method: str) -> dict:
    """Ours are thick and solid, the others thin and dashed; one colour a method everywhere."""
    ours = METHODS[method].ours
    alike = [m for m in METHODS if METHODS[m].ours == ours]
    colours = plt.get_cmap("tab10" if ours else "tab20b").colors
    return {
        "label": METHODS[method].title,
        "color": colours[alike.index(method) * (1 if ours else 2)],
        "lw": 2.0 if ours else 1.1,
        "ls": "-" if ours else "--",
        "marker": "o",
        "markersize": 3,
    }
