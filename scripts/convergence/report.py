"""The table and the pictures of a study, from its summaries."""

import math
import statistics
from collections.abc import Callable
from pathlib import Path

from .costs import RATIOS
from .methods import METHODS
from .pictures import draw
from .plan import steps_to
from .study import BASELINE
from .summary import Summary, TaskSummary, half_interval

COLUMNS = (
    "learning rate",
    "rates within 2 %",
    "test loss",
    "accuracy",
    "steps to LoRA's loss",
    "shorter runs: loss",
    "suggested rate: loss",
    "time to LoRA's loss, in its steps",
    "loss on old data",
    "step",
    "memory",
)
OVERVIEW_COLUMNS = (
    "loss",
    "next to LoRA",
    "numbers",
    "rate",
    "range",
    "shorter",
    "suggested rate",
)


def interval(values: list[float], digits: int = 3, *, signed: bool = False) -> str:
    """Mean and half of its 95 % interval."""
    mean = statistics.mean(values)
    sign = "+" if signed else ""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return f"{mean:{sign}.{digits}f}"
    return f"{mean:{sign}.{digits}f} ± {half_interval(values):.{digits}f}"


def difference(losses: list[float], others: list[float]) -> str:
    """Mean of the differences by seed, and half of its interval."""
    return interval(_by_seed(losses, others), signed=True)


def _by_seed(losses: list[float], others: list[float]) -> list[float]:
    return [loss - other for loss, other in zip(losses, others, strict=True)]


def table(task: TaskSummary) -> str:
    """One task as a Markdown table."""
    rows = ["| | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for method, summary in task.in_order().items():
        rows.append(f"| {name_of(method)} | {' | '.join(_cells(task, summary))} |")
    return "\n".join(rows)


def _cells(task: TaskSummary, summary: Summary) -> list[str]:
    low, high = summary.usable
    return [
        f"{summary.lr:g}",
        f"{low:.1e} to {high:.1e} ({summary.breadth:.1f})",
        interval(summary.losses),
        interval(summary.accuracies),
        _steps_to_aim(summary, task),
        _at_rate(summary.short_lr, summary.short_loss, task.aim),
        _at_rate(summary.suggested_lr, summary.suggested_loss, task.aim),
        _time_to_aim(summary, task),
        f"{statistics.mean(summary.forgetting):+.2f}" if summary.forgetting else "-",
        *(_cost(summary.costs, name) for name in RATIOS),
    ]


def _steps_to_aim(summary: Summary, task: TaskSummary) -> str:
    steps = steps_to(summary.curve, task.aim)
    return "-" if steps is None else f"{steps:.0f} ({steps / task.steps:.0%})"


def _next_to(loss: float, aim: float) -> str:
    return f"{loss:.3f} ({loss / aim - 1:+.1%})"


def _at_rate(lr: float | None, loss: float | None, aim: float) -> str:
    return "-" if loss is None else f"{lr:g}: {_next_to(loss, aim)}"


def _time_to_aim(summary: Summary, task: TaskSummary) -> str:
    steps, costs = steps_to(summary.curve, task.aim), summary.costs
    if not costs or steps is None:
        return "-"
    trained = steps - summary.start_steps
    return f"{_start(costs) + trained * _ratio(costs, 'step_seconds'):.0f}"


def _cost(costs: dict[str, float], name: str) -> str:
    return f"{_ratio(costs, name):.2f}" if name in costs else "-"


def _ratio(costs: dict[str, float], name: str) -> float:
    """Next to LoRA's of the same call: seconds of two calls cannot be compared on a shared machine."""
    return costs[name] / costs[f"lora_{name}"]


def _start(costs: dict[str, float]) -> float:
    """What comes before training, as that many steps of LoRA in the same call."""
    return costs["start_seconds"] / costs["lora_step_seconds"]


def aims(task: TaskSummary) -> str:
    """What became of the two aims, in two lines."""
    ours = {m: s for m, s in task.in_order().items() if METHODS[m].ours}
    baseline, lines = task.methods[BASELINE], []
    short = {m: s.short_loss for m, s in ours.items() if s.short_loss is not None}
    if short:
        best, final = min(short, key=lambda m: short[m]), min(ours, key=lambda m: ours[m].loss)
        lines.append(
            f"Speed: of ours, the best shorter run ({METHODS[best].title}) ends "
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
    """The methods as short Markdown tables, one a task; for `docs/benchmarks/tables.md`."""
    return "\n\n".join(_short_table(task) for task in tasks)


def _short_table(task: TaskSummary) -> str:
    head = ["| " + " | ".join((task.task, *OVERVIEW_COLUMNS)) + " |"]
    head.append("|---" * (len(OVERVIEW_COLUMNS) + 1) + "|")
    rows = []
    for method, summary in task.in_order().items():
        rows.append(f"| {name_of(method)} | {' | '.join(_short_cells(task, summary))} |")
    return "\n".join(head + rows)


def _short_cells(task: TaskSummary, summary: Summary) -> list[str]:
    def relative(loss: float | None) -> str:
        return "" if loss is None else f"{loss / task.aim - 1:+.1%}"

    baseline = task.methods[BASELINE]
    return [
        interval(summary.losses),
        "" if summary is baseline else difference(summary.losses, baseline.losses),
        f"{summary.n_trained / baseline.n_trained:.2f}",
        f"{summary.lr:.1e}",
        f"{summary.breadth:.1f}",
        relative(summary.short_loss),
        relative(summary.suggested_loss),
    ]


def at_a_glance(tasks: list[TaskSummary]) -> str:
    """By how much methods end above or below LoRA, in percent of its loss: bold if the interval lacks zero.

    Args:
        tasks: the summaries.

    Returns:
        A Markdown table: a row a method, a column a task.
    """
    return _by_task(tasks, _percent_of_baseline)


def _percent_of_baseline(task: TaskSummary, method: str) -> str:
    summary = task.in_order().get(method)
    if summary is None or method == BASELINE:
        return ""
    differences = _by_seed(summary.losses, task.methods[BASELINE].losses)
    mean, half = statistics.mean(differences), half_interval(differences)
    percent = f"{mean / task.aim:+.1%}"
    return f"**{percent}**" if abs(mean) > half else percent


def without_sweep(tasks: list[TaskSummary]) -> str:
    """Losses at the suggested rates, next to LoRA's at its own, as a Markdown table."""
    return _by_task(tasks, _next_to_baseline(lambda summary: summary.suggested_losses))


def shorter(tasks: list[TaskSummary]) -> str:
    """Losses of runs of 60 % of the steps, next to LoRA's of as many, as a Markdown table."""
    return _by_task(tasks, _next_to_baseline(lambda summary: summary.short_losses))


def longer(tasks: list[TaskSummary]) -> str:
    """Losses of runs that are four times as long, next to LoRA's, as a Markdown table."""
    return _by_task(tasks, _next_to_baseline(lambda summary: summary.long_losses))


def _by_task(tasks: list[TaskSummary], cell: Callable[[TaskSummary, str], str]) -> str:
    """A row a method, a column a task, without the rows that are empty.

    Args:
        tasks: the summaries.
        cell: what a method has on a task, from the task and the method's name.

    Returns:
        A Markdown table.
    """
    lines = ["| | " + " | ".join(t.task for t in tasks) + " |", "|---" * (len(tasks) + 1) + "|"]
    for method in METHODS:
        cells = [cell(task, method) for task in tasks]
        if any(cells):
            lines.append(f"| {name_of(method)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _next_to_baseline(
    losses: Callable[[Summary], list[float]],
) -> Callable[[TaskSummary, str], str]:
    """A cell with the losses of some kind of run, next to LoRA's of that kind."""

    def cell(task: TaskSummary, method: str) -> str:
        summary, of_baseline = task.in_order().get(method), losses(task.methods[BASELINE])
        if summary is None or not losses(summary):
            return ""
        loss = f"{statistics.mean(losses(summary)):.3f}"
        if method == BASELINE or not of_baseline:
            return loss
        return f"{loss} ({difference(losses(summary), of_baseline)})"

    return cell


BESIDE_COLUMNS = ("start", "step", "memory", "old data", "intruders", "size of the change")


def beside(tasks: list[TaskSummary]) -> str:
    """What the methods cost and change beside the task, one Markdown table a task; for the same page."""
    return "\n\n".join(table for task in tasks if (table := _beside_table(task)))


def _beside_table(task: TaskSummary) -> str:
    rows = [
        f"| {name_of(m)} | {' | '.join(_beside_cells(s))} |"
        for m, s in task.in_order().items()
        if s.changes or s.costs or s.forgetting
    ]
    head = "| " + " | ".join((task.task, *BESIDE_COLUMNS)) + " |"
    return "\n".join([head, "|---" * (len(BESIDE_COLUMNS) + 1) + "|", *rows]) if rows else ""


def _beside_cells(summary: Summary) -> list[str]:
    costs, changes = summary.costs, summary.changes
    return [
        f"{_start(costs):.1f}" if costs else "",
        *(_cost(costs, name) if costs else "" for name in RATIOS),
        interval(summary.forgetting, signed=True) if summary.forgetting else "",
        f"{changes['intruders']:.2f}" if changes else "",
        f"{changes['size']:.1%}" if changes else "",
    ]


def name_of(method: str) -> str:
    """A method's title; that of ours is bold."""
    info = METHODS[method]
    return f"**{info.title}**" if info.ours else info.title


def markdown(tasks: list[TaskSummary]) -> str:
    """The tables and the pictures of all tasks."""
    return "\n\n".join(
        f"**{t.task}**, {t.about}:\n\n{table(t)}\n\n{aims(t)}\n\n{_shown(t)}" for t in tasks
    )


def _shown(task: TaskSummary) -> str:
    """The task's pictures, which lie beside the report."""
    captions = {"rates": "Loss by learning rate", "curves": "Loss by step"}
    return "\n\n".join(
        f"![{task.task}: {caption}]({name}_{task.task}.png)" for name, caption in captions.items()
    )


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
    for task in tasks:
        draw(task, folder)
    return text
