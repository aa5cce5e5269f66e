"""The figures of a study, from its results alone; small enough to be kept."""

import dataclasses
import json
import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scipy import stats

from peft_gradinit.files import write_json

from .methods import METHODS
from .plan import best_rate, usable_range
from .study import BASELINE, Study, final_loss


def half_interval(values: list[float]) -> float:
    """Half of the 95 % interval of a mean; 0 where there is none."""
    if len(values) < 2 or not all(map(math.isfinite, values)):
        return 0.0
    quantile = float(stats.t.ppf(0.975, len(values) - 1))
    return quantile * statistics.stdev(values) / len(values) ** 0.5


@dataclass(frozen=True)
class Summary:
    """One method on one task, at its best learning rate.

    Attributes:
        lr: the best of the search.
        search: mean final loss by learning rate; `None` where runs diverged.
        usable: lowest and highest rate within 2 % of the best.
        losses: final test loss of every seed.
        accuracies: of every seed.
        short_lr: the best rate of shorter runs.
        short_losses: their final loss, of every seed.
        suggested_lr: the rate that the package suggests, if it does.
        suggested_losses: final loss there, of every seed.
        forgetting: growth of the loss on the pretraining distribution, of every seed.
        start_steps: what the calibration counts.
        n_trained: parameters.
        curve: `[step, mean test loss]`, calibration included.
        costs: of `costs`, if measured.
        spread: half of the 95 % interval of every loss of the curve; empty in older summaries.
        changes: of `changes`, if measured at this rate.
        data: tells data apart; empty in older summaries.
        device: where the runs were made; empty in older summaries.
        long_lr: the best rate of runs that are four times as long.
        long_losses: their final loss, of every seed.
    """

    lr: float
    search: dict[float, float | None]
    usable: tuple[float, float]
    losses: list[float]
    accuracies: list[float]
    short_lr: float | None
    short_losses: list[float]
    suggested_lr: float | None
    suggested_losses: list[float]
    forgetting: list[float]
    start_steps: float
    n_trained: int
    curve: list[list[float]]
    costs: dict[str, float] = field(default_factory=dict)
    spread: list[float] = field(default_factory=list)
    changes: dict[str, float] = field(default_factory=dict)
    data: str = ""
    device: str = ""
    long_lr: float | None = None
    long_losses: list[float] = field(default_factory=list)

    @property
    def loss(self) -> float:
        """Mean final loss."""
        return statistics.mean(self.losses)

    @property
    def short_loss(self) -> float | None:
        """Mean final loss of the shorter runs."""
        return statistics.mean(self.short_losses) if self.short_losses else None

    @property
    def suggested_loss(self) -> float | None:
        """Mean final loss at the suggested rate."""
        return statistics.mean(self.suggested_losses) if self.suggested_losses else None

    @property
    def breadth(self) -> float:
        """How many times the highest usable rate is the lowest."""
        return self.usable[1] / self.usable[0]

    @property
    def steps(self) -> int:
        """Of a whole run, the calibration included."""
        return round(self.curve[-1][0])


@dataclass(frozen=True)
class TaskSummary:
    """All methods of a task.

    Attributes:
        task: name of the settings.
        about: steps, rank and seeds, for people.
        steps: of a whole run, the calibration included.
        methods: by name; LoRA is among them. Those of fewer steps are of an earlier study.
        key: of the settings; empty in older summaries.
    """

    task: str
    about: str
    steps: int
    methods: dict[str, Summary]
    key: str = ""

    def in_order(self) -> dict[str, Summary]:
        """The methods in the order of the table of methods, without those of fewer steps."""
        known = {m: self.methods[m] for m in METHODS if m in self.methods}
        return {m: summary for m, summary in known.items() if summary.steps >= self.steps}

    def searches(self) -> dict[str, dict[float, float]]:
        """Mean final losses by learning rate, by method; infinite where runs diverged."""
        return {
            method: {lr: math.inf if loss is None else loss for lr, loss in of.search.items()}
            for method, of in self.methods.items()
        }

    @property
    def aim(self) -> float:
        """Tuned LoRA's mean final loss."""
        return self.methods[BASELINE].loss


def summarise_task(
    study: Study, methods: Iterable[str], earlier: TaskSummary | None = None
) -> TaskSummary | None:
    """Summarise the methods whose runs are done; nothing if LoRA's are not.

    Args:
        study: of the task.
        methods: names.
        earlier: a summary of the same settings; what has no runs here is taken from it.
    """
    kept = {} if earlier is None else earlier.methods
    found = {m: _summary(study, m, kept.get(m)) for m in (BASELINE, *methods)}
    if found[BASELINE] is None:
        return None
    settings = study.settings
    task = TaskSummary(
        task=settings.task,
        about=(
            f"{study.whole} steps of {settings.training.batch_size}, the calibration included, "
            f"r {settings.adapter['r']}, {settings.seeds} seeds"
        ),
        steps=study.whole,
        methods=kept | {m: s for m, s in found.items() if s},
        key=settings.key,
    )
    origins = {(s.data, s.device) for s in task.in_order().values() if s.data}
    if len(origins) > 1:
        raise SystemExit(
            f"{settings.task}: rows of different data or devices cannot be compared: {sorted(origins)}"
        )
    return task


def _summary(study: Study, method: str, earlier: Summary | None) -> Summary | None:
    """What the runs say; what they do not say is as it was in an earlier summary."""
    summary = _whole(study, method)
    if summary is None:
        summary = earlier
    elif earlier is not None:
        kinds = ("short", "long", "suggested")
        same = ["costs", *(f"{kind}_{what}" for kind in kinds for what in ("lr", "losses"))]
        same += ["changes"] if earlier.lr == summary.lr else []
        summary = replace(summary, **{name: getattr(earlier, name) for name in same})
    if summary is None:
        return None
    beside = _beside(study, method, summary.lr) | _at_suggestion(study, method, summary)
    return replace(summary, **beside)


def _whole(study: Study, method: str) -> Summary | None:
    """Of whole runs, if all of them are there."""
    search = study.searched(method)
    if search is None:
        return None
    lr, steps = best_rate(search), study.trained(method)
    runs = [r for r in study.runs(method) if r["seed"] in study.settings.reported]
    whole = _chosen(runs, lr, steps)
    if len(whole) < study.settings.seeds:
        return None
    curves, before = _curves(whole), whole[0]["start_steps"]
    return Summary(
        lr=lr,
        search={lr: loss if math.isfinite(loss) else None for lr, loss in sorted(search.items())},
        usable=usable_range(search),
        losses=list(map(final_loss, whole)),
        accuracies=[r["curve"][-1][2] for r in whole],
        short_lr=None,
        short_losses=[],
        suggested_lr=None,
        suggested_losses=[],
        forgetting=[
            r["source_loss"][1] - r["source_loss"][0] for r in whole if r["source_loss"][0]
        ],
        start_steps=before,
        n_trained=whole[0]["n_trainable"],
        curve=[
            [points[0][0] + before, statistics.mean(p[1] for p in points)]
            for points in zip(*curves, strict=True)
        ],
        spread=[half_interval([p[1] for p in points]) for points in zip(*curves, strict=True)],
        data=whole[0].get("data", ""),
        device=whole[0].get("device", ""),
    )


def _curves(runs: list[dict]) -> list[list[list[float]]]:
    """`[step, loss]` of every run at the same steps; infinite from where a run diverged."""
    marks = max((run["curve"] for run in runs), key=len)
    return [
        [
            [
                step,
                math.inf
                if i >= len(run["curve"]) or run["curve"][i][1] is None
                else run["curve"][i][1],
            ]
            for i, (step, *_) in enumerate(marks)
        ]
        for run in runs
    ]


def _beside(study: Study, method: str, lr: float) -> dict[str, Any]:
    """What is known beside whole runs: runs of other lengths, costs, changes at the rate."""
    changes = study.kept("changes").get(method, {})
    known: dict[str, Any] = {"costs": study.kept("costs").get(method)}
    if changes.get("lr", lr) == lr:
        known["changes"] = {name: value for name, value in changes.items() if name != "lr"}
    for name, steps in (("short", study.shorter(method)), ("long", study.longer())):
        search = study.search(method, steps)
        lr = best_rate(search) if search else None
        losses = _losses(study, study.runs(method), lr, steps)
        known |= {f"{name}_lr": lr, f"{name}_losses": losses} if losses else {}
    return {name: value for name, value in known.items() if value}


def _at_suggestion(study: Study, method: str, summary: Summary) -> dict[str, Any]:
    """The suggested rate, which may be that of an earlier search, and the losses there, if they are known here."""
    lr = study.suggested(method) or summary.suggested_lr
    losses = _losses(study, study.runs(method), lr, study.trained(method))
    if lr == summary.suggested_lr and not losses:
        return {}
    return {"suggested_lr": lr, "suggested_losses": losses}


def _losses(study: Study, runs: list[dict], lr: float | None, steps: int) -> list[float]:
    """Final losses of every reported seed; none unless all of them are there."""
    reported = [run for run in runs if run["seed"] in study.settings.reported]
    losses = [final_loss(run) for run in _chosen(reported, lr, steps)]
    return losses if len(losses) == study.settings.seeds else []


def _chosen(runs: list[dict], lr: float | None, steps: int) -> list[dict]:
    chosen = [r for r in runs if r["lr"] == lr and r["steps"] == steps]
    return sorted(chosen, key=lambda r: r["seed"])


def save(summary: TaskSummary, folder: Path) -> None:
    """Keep a summary, numbers of six digits."""
    write_rounded(folder / f"{summary.task}.json", dataclasses.asdict(summary))


def write_rounded(path: Path, values: dict[str, Any]) -> None:
    """Keep values as JSON, numbers of six digits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, json.loads(json.dumps(values), parse_float=short))


def short(number: str) -> float:
    """Six digits of a number of JSON."""
    return float(f"{float(number):.6g}")


def load(folder: Path) -> list[TaskSummary]:
    """The summaries that were kept in a folder, by task."""
    texts = [p.read_text(encoding="utf-8") for p in sorted(folder.glob("*.json"))]
    return [_from_dict(json.loads(text)) for text in texts]


def _from_dict(values: dict) -> TaskSummary:
    methods = {}
    for name, of in values["methods"].items():
        search = dict(sorted((float(lr), loss) for lr, loss in of["search"].items()))
        losses = {key: _with_infinities(of[key]) for key in of if key.endswith("losses")}
        curve = [_with_infinities(point) for point in of["curve"]]
        read = {"search": search, "usable": tuple(of["usable"]), "curve": curve}
        methods[name] = Summary(**{**of, **losses, **read})
    return TaskSummary(**{**values, "methods": methods})


def _with_infinities(numbers: list[float | None]) -> list[float]:
    """JSON has no infinities: the losses of runs that diverged are `null` there."""
    return [math.inf if number is None else number for number in numbers]
