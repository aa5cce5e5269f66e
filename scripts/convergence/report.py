"""The table and the pictures of a study, from its results alone."""

import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl

mpl.use("Agg")
import matplotlib.pyplot as plt

from .methods import METHODS
from .plan import SEEDS, best_rate, next_rates, steps_to, usable_range
from .study import BASELINE, Study, final_loss

T_95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776}
"""Quantiles of Student's t for a 95 % interval of the mean, by the number of runs."""
COLUMNS = (
    "learning rate",
    "rates within 2 %",
    "test loss",
    "accuracy",
    "steps to LoRA's loss",
    "shortest run that ends there",
    "seconds to LoRA's loss",
    "loss on old data",
    "step",
    "memory",
)


@dataclass(frozen=True)
class Summary:
    """One method on one task, at its best learning rate.

    Attributes:
        lr: the best of the search.
        usable: lowest and highest rate within 2 % of the best.
        losses: final test loss of every seed.
        accuracies: of every seed.
        reach: steps until tuned LoRA's mean final loss, of every seed, calibration included; infinite if
            never.
        shorter: `{steps of the run: mean final loss}`, calibration included in the steps.
        forgetting: growth of the loss on the pretraining distribution, of every seed.
        start_steps: what the calibration counts.
    """

    lr: float
    usable: tuple[float, float]
    losses: list[float]
    accuracies: list[float]
    reach: list[float]
    shorter: dict[float, float]
    forgetting: list[float]
    start_steps: float


def summarise(study: Study, method: str, aim: float | None) -> Summary | None:
    """Summarise what there is; nothing if the search of the method is not over.

    Args:
        study: of the task.
        method: its name.
        aim: tuned LoRA's mean final loss.
    """
    search = study.search(method)
    if next_rates(METHODS[method].first_rate, search):
        return None
    lr = best_rate(search)
    at_best = [r for r in study.runs(method) if r["lr"] == lr]
    whole = sorted((r for r in at_best if r["steps"] == study.steps), key=lambda r: r["seed"])
    aim = statistics.mean(map(final_loss, whole)) if aim is None else aim
    lengths = sorted({r["steps"] for r in at_best})
    return Summary(
        lr=lr,
        usable=usable_range(search),
        losses=[final_loss(r) for r in whole],
        accuracies=[r["curve"][-1][2] for r in whole],
        reach=[_reach(r, aim) for r in whole],
        shorter={
            n + whole[0]["start_steps"]: statistics.mean(
                final_loss(r) for r in at_best if r["steps"] == n
            )
            for n in lengths
            if sum(r["steps"] == n for r in at_best) == len(SEEDS)
        },
        forgetting=[
            r["source_loss"][1] - r["source_loss"][0] for r in whole if r["source_loss"][0]
        ],
        start_steps=whole[0]["start_steps"],
    )


def summaries(study: Study, methods: Iterable[str]) -> dict[str, Summary]:
    """All methods whose search is over, LoRA among them."""
    baseline = summarise(study, BASELINE, None)
    if baseline is None:
        return {}
    aim = statistics.mean(baseline.losses)
    found = {m: summarise(study, m, aim) for m in methods}
    return {m: s for m, s in found.items() if s is not None}


def _reach(run: dict, aim: float) -> float:
    steps = steps_to(run["curve"], aim)
    return math.inf if steps is None else steps + run["start_steps"]


def interval(values: list[float], digits: int = 3) -> str:
    """Mean and half of its 95 % interval."""
    mean = statistics.mean(values)
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return f"{mean:.{digits}f}"
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:.{digits}f} ± {half:.{digits}f}"


def table(study: Study, found: dict[str, Summary]) -> str:
    """One task as a Markdown table."""
    costs = _costs(study)
    head = "| | " + " | ".join(COLUMNS) + " |"
    rows = [head, "|---" * (len(COLUMNS) + 1) + "|"]
    for method, summary in found.items():
        name = METHODS[method].title
        cells = _cells(study, summary, costs, method, found[BASELINE])
        rows.append(f"| {f'**{name}**' if METHODS[method].ours else name} | {' | '.join(cells)} |")
    return "\n".join(rows)


def _cells(
    study: Study, summary: Summary, costs: dict, method: str, baseline: Summary
) -> list[str]:
    low, high = summary.usable
    reach = statistics.median(summary.reach)
    cost, of_lora = costs.get(method), costs.get(BASELINE)
    seconds = step = memory = "-"
    if cost and of_lora:
        step = f"{cost['step_seconds'] / of_lora['step_seconds']:.2f}"
        memory = f"{cost['training_mib'] / of_lora['training_mib']:.2f}"
        n_trained = reach - summary.start_steps
        if math.isfinite(reach):
            seconds = f"{cost['start_seconds'] + n_trained * cost['step_seconds']:.1f}"
    aim = statistics.mean(baseline.losses)
    return [
        f"{summary.lr:g}",
        f"{low:.1e} to {high:.1e} ({high / low:.1f})",
        interval(summary.losses),
        interval(summary.accuracies),
        _share(reach, study.steps),
        _share(shortest(summary.shorter, aim), study.steps),
        seconds,
        f"{statistics.mean(summary.forgetting):+.2f}" if summary.forgetting else "-",
        step,
        memory,
    ]


def shortest(lengths: dict[float, float], aim: float) -> float:
    """Length of the shortest run that would end at the aim, between two lengths linearly.

    Args:
        lengths: final loss by length.
        aim: a loss.

    Returns:
        Steps; infinite if none does; the least that was tried if all do.
    """
    curve = sorted(lengths.items())
    if not curve:
        return math.inf
    if curve[0][1] <= aim:
        return curve[0][0]
    steps = steps_to([list(point) for point in curve], aim)
    return math.inf if steps is None else steps


def _share(steps: float, whole: int) -> str:
    return f"{steps:.0f} ({steps / whole:.0%})" if math.isfinite(steps) else "-"


def _costs(study: Study) -> dict:
    path = study.folder / "costs.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def write_report(studies: list[Study], methods: Iterable[str], folder: Path) -> str:
    """Write `report.md` and two pictures a task; return the Markdown."""
    parts = []
    methods = list(methods)
    for study in studies:
        found = summaries(study, methods)
        name = study.settings.task
        if not found:
            parts.append(f"### {name}\n\nThe search for LoRA's learning rate is not over.")
            continue
        training = study.settings.training
        r = study.settings.adapter["r"]
        about = f"{training.steps} steps of {training.batch_size}, r {r}, {len(SEEDS)} seeds"
        parts.append(f"### {name}: {about}\n\n{table(study, found)}")
        draw_rates(study, found, folder / f"{name}_rates.png")
        draw_curves(study, found, folder / f"{name}_curves.png")
    text = "\n\n".join(parts)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "report.md").write_text(text + "\n", encoding="utf-8")
    return text


def draw_rates(study: Study, found: dict[str, Summary], path: Path) -> None:
    """Final loss against the learning rate: how much a method depends on it."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    losses = [loss for m in found for loss in study.search(m).values() if math.isfinite(loss)]
    for method in found:
        points = sorted((lr, loss) for lr, loss in study.search(method).items())
        axes.plot(*zip(*points, strict=True), **_style(method))
    axes.set(xscale="log", xlabel="learning rate", ylabel="test loss after the last step")
    best = min(losses)
    top = min(max(losses), 1.5 * best)  # rates that are far too low or high would hide the others
    axes.set_ylim(best - 0.05 * (top - best), top)
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3, which="both", lw=0.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def draw_curves(study: Study, found: dict[str, Summary], path: Path) -> None:
    """Test loss against the steps, calibration included, each at its best learning rate."""
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    tops = []
    for method, summary in found.items():
        runs = [
            r for r in study.runs(method) if r["lr"] == summary.lr and r["steps"] == study.steps
        ]
        steps = [point[0] + runs[0]["start_steps"] for point in runs[0]["curve"]]
        means = [
            statistics.mean(p[1] for p in points)
            for points in zip(*(r["curve"] for r in runs), strict=True)
        ]
        axes.plot(steps, means, **_style(method))
        tops.append(means[max(1, len(means) // 10)])
    aim = statistics.mean(found[BASELINE].losses)
    axes.axhline(aim, color="0.6", lw=0.8, ls=":")
    axes.axvline(0.6 * study.steps, color="0.6", lw=0.8, ls=":")
    low = min(statistics.mean(s.losses) for s in found.values())
    axes.set_ylim(low - 0.05 * (max(tops) - low), max(tops))
    axes.set(xlabel="steps, calibration included", ylabel="test loss")
    axes.legend(fontsize=7, ncols=2)
    axes.grid(alpha=0.3, lw=0.4)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


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
