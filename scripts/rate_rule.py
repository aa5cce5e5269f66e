"""How far rules for the learning rate are from the best rate of plain LoRA: every model left out once.

    python scripts/rate_rule.py measure [TASK …]   # what the rules need, of every task that has been searched
    python scripts/rate_rule.py                    # the rules next to the best rates

`measure` takes tasks of `scripts/convergence/configs/` or files, reads their searches from
`out/convergence/results` (`bench_convergence.py run --methods lora`), measures the curvature of the loss at
the start, and adds to `scripts/convergence/measured/rates/rates.json`.

A rule has one constant, fitted on the conditions of the other models. Reported is what the best rate is
over the rule's. The second table is of optimisers of pairs: their best rates over AdamW's suggestion for the
same start, from the published searches at equal numbers.
"""

import argparse
import itertools
import json
import math
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from convergence.methods import METHODS
from convergence.plan import best_rate, next_rates
from convergence.study import Study, load_task, prepare_process
from convergence.summary import Summary, TaskSummary, short
from convergence.summary import load as load_tasks
from convergence.tasks import size
from convergence.training import calibration_batches, labels_per_step
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from peft_gradinit import pairs, suggest_learning_rate
from peft_gradinit.files import write_json
from peft_gradinit.optim import OPTIMIZERS
from peft_gradinit.tuners import guidance

MEASURED = Path(__file__).parent / "convergence" / "measured" / "rates" / "rates.json"
STUDY = MEASURED.parents[1]
RESULTS = Path("out/convergence/results")
METHOD = "lora"
PROBE = 1e-4
"""Length of the two-sided difference, of the largest entry: below any good rate."""
POWER_STEPS = 5
RATES, SHARES = guidance.RATES, guidance.SHARES
"""What the package suggests for optimisers of pairs: a rate, or a share of AdamW's."""
OF_PACKAGE = RATES | SHARES


@dataclass(frozen=True)
class Condition:
    """A task, with what rules are made of.

    Attributes:
        name: of the task's file.
        model: tasks of one model are left out together.
        best: the rate of the least loss, of a parabola through the best of the grid and its neighbours.
        factor: the highest rate within 2 % of the best loss, over the lowest.
        today: the rate that the package suggests.
        labels: with loss, of a step.
        width: median of the adapted layers' inputs.
        r: rank.
        scaling: of the product.
        steps: of a run.
        epochs: of a run.
        along: `g d / (d H d)` for the direction `d` of Adam's first step: where the loss is least along it.
        largest: largest eigenvalue of the Hessian of the adapter's numbers.
    """

    name: str
    model: str
    best: float
    factor: float
    today: float
    width: float
    r: int
    scaling: float
    steps: int
    epochs: float
    along: float
    largest: float
    labels: float


RULES: dict[str, Callable[[Condition], float]] = {
    "today: 1 / (4 √(in s r))": lambda c: c.today,
    "today, by the fourth root of a step's labels up to 200": lambda c: (
        c.today * min(1.0, c.labels / 200) ** 0.25
    ),
    "in^-1/2, any rank": lambda c: c.width**-0.5,
    "in^-0.78, any rank": lambda c: c.width**-0.78,
    "in^-1 r^-1/2": lambda c: c.width**-1 * c.r**-0.5,
    "the same rate everywhere": lambda c: 1.0,
    "today, by the root of the steps": lambda c: c.today * c.steps**-0.5,
    "today, by the root of the epochs": lambda c: c.today * c.epochs**-0.5,
    "least loss along Adam's first step": lambda c: c.along,
    "its root": lambda c: c.along**0.5,
    "root of the least and of today": lambda c: (c.along * c.today) ** 0.5,
    "largest curvature, inverse": lambda c: 1 / c.largest,
    "largest curvature, root of the inverse": lambda c: c.largest**-0.5,
}
"""Each up to its constant."""


def left_out(conditions: list[Condition], rule: Callable[[Condition], float]) -> dict[str, float]:
    """Best rate over that of the rule fitted on the other models, by condition."""
    return over_others(
        {c.name: c.best / rule(c) for c in conditions}, {c.name: c.model for c in conditions}
    )


def over_others(ratios: dict[str, float], models: dict[str, str]) -> dict[str, float]:
    """Each ratio over the geometric mean of those of the other models; both by condition."""
    found = {}
    for name, ratio in ratios.items():
        others = [math.log(of) for o, of in ratios.items() if models[o] != models[name]]
        found[name] = ratio / math.exp(statistics.mean(others))
    return found


def interpolated(losses: dict[float, float]) -> float:
    """The rate of the least loss, of a parabola in the logarithm of the rate."""
    rates = sorted(lr for lr, loss in losses.items() if math.isfinite(loss))
    middle = rates.index(best_rate({lr: losses[lr] for lr in rates}))
    near = rates[max(0, middle - 1) : middle + 2]
    if len(near) < 3:
        return rates[middle]
    a, b, _ = np.polyfit([math.log(lr) for lr in near], [losses[lr] for lr in near], 2)
    return float(np.clip(math.exp(-b / (2 * a)), near[0], near[-1]))


@dataclass(frozen=True)
class OfPairs:
    """An optimiser of pairs next to AdamW, of the searches of all tasks.

    Attributes:
        over_adamw: best rate over the suggestion for AdamW with the same start, by task and start; of
            LoRA-Muon the best rate itself.
        models: of these conditions.
        excess: loss at the package's rate over the best of the search, interpolated, by condition; `None`
            where the search has no rate on both sides, or a run that diverged.
    """

    over_adamw: dict[str, float]
    models: dict[str, str]
    excess: dict[str, float | None]

    @property
    def share(self) -> float:
        """What fits all conditions: the geometric mean."""
        return math.exp(statistics.mean(map(math.log, self.over_adamw.values())))

    def worst_excess(self, model: str) -> float | None:
        """The largest excess on a model; `None` if there is none that is known."""
        found = [e for name, e in self.excess.items() if self.models[name] == model]
        return max((e for e in found if e is not None), default=None)


def of_pairs(tasks: list[TaskSummary]) -> dict[str, OfPairs]:
    """The optimisers of pairs, by name."""
    return {kind.name: _of_pairs(kind.name, tasks) for kind in OPTIMIZERS}


def _of_pairs(name: str, tasks: list[TaskSummary]) -> OfPairs:
    found = OfPairs({}, {}, {})
    for task in tasks:
        for method, summary in task.methods.items():
            start, _, optimizer = method.partition("+")
            if optimizer != name:
                continue
            known = task.methods.get(start)
            unit = 1.0 if name in RATES else known and known.suggested_lr
            if not unit:
                continue
            condition = f"{task.task}, {start}"
            found.over_adamw[condition] = interpolated(_searched(summary)) / unit
            found.models[condition] = task.task
            found.excess[condition] = excess_at(unit * OF_PACKAGE[name], _searched(summary))
    return found


STARTS = ("lora", "lora_one", "lora_one_ranks", "lora_ga", "eva", "corda", "svfit")
"""Rows with AdamW whose suggestion the page holds against the searches; the names of the study."""


def of_starts(tasks: list[TaskSummary]) -> dict[str, dict[str, float]]:
    """Best rate of each start over its suggestion, by the task; of those that have both."""
    return {
        name: {
            task.task: interpolated(_searched(summary)) / summary.suggested_lr
            for task in tasks
            if (summary := task.methods.get(name)) and summary.suggested_lr
        }
        for name in STARTS
    }


def _searched(summary: Summary) -> dict[float, float]:
    return {lr: math.inf if loss is None else loss for lr, loss in summary.search.items()}


def excess_at(rate: float, losses: dict[float, float]) -> float | None:
    """The loss at a rate over the least one, less 1; linear in the logarithm of the rate."""
    for low, high in itertools.pairwise(sorted(losses)):
        if low <= rate <= high and math.isfinite(losses[low]) and math.isfinite(losses[high]):
            part = math.log(rate / low) / math.log(high / low)
            return (losses[low] + part * (losses[high] - losses[low])) / min(losses.values()) - 1
    return None


def measure(name: str, results: Path) -> Condition:
    """A condition from a search that is over, and from the model at its start.

    Raises:
        SystemExit: if the search is not over.
    """
    study = Study(results, name)
    losses = study.search(METHOD)
    if next_rates(METHODS[METHOD].first_rate, losses):
        raise SystemExit(f"{name}: the search for the rate of {METHOD} is not over.")
    task, settings = load_task(name), study.settings
    batches = calibration_batches(task, 0)
    torch.manual_seed(0)
    model = METHODS[METHOD].start(task.load_model(), task, batches)
    model.eval()
    widths = [p.A.shape[1] for p in pairs(model)]
    return Condition(
        name=Path(name).stem,
        model="smollm2" if settings.task in ("reference", "functions") else settings.task,
        best=interpolated(losses),
        factor=_factor(losses),
        today=suggest_learning_rate(model).suggested,
        labels=labels_per_step(task),
        width=float(statistics.median(widths)),
        r=settings.adapter["r"],
        scaling=next(iter(pairs(model))).scaling,
        steps=study.steps,
        epochs=study.steps * settings.training.batch_size / size(task.train),
        **curvature(model, batches),
    )


def curvature(model: nn.Module, batches: list) -> dict[str, float]:
    """Curvature of the mean loss of the batches in the adapter's numbers, from differences of gradients."""
    factors = [f for p in pairs(model) for f in (p.A, p.B)]

    def gradient() -> list[Tensor]:
        mean = torch.stack([model(**batch).loss for batch in batches]).mean()
        return list(torch.autograd.grad(mean, factors))

    def times_hessian(direction: list[Tensor]) -> list[Tensor]:
        longest = max(d.abs().max().item() for d in direction)
        step = PROBE / longest
        sides = []
        for sign in (1, -1):
            _move(factors, direction, sign * step)
            sides.append(gradient())
            _move(factors, direction, -sign * step)
        return [(up - down) / (2 * step) for up, down in zip(*sides, strict=True)]

    first = gradient()
    adam = [-g.sign() for g in first]
    decrease = -_dot(first, adam)
    along = decrease / max(_dot(adam, times_hessian(adam)), 1e-12)
    direction, largest = first, 0.0
    for _ in range(POWER_STEPS):
        norm = math.sqrt(_dot(direction, direction))
        direction = [d / norm for d in direction]
        turned = times_hessian(direction)
        largest, direction = _dot(direction, turned), turned
    return {"along": along, "largest": abs(largest)}


@torch.no_grad()
def _move(factors: list[nn.Parameter], direction: list[Tensor], step: float) -> None:
    for factor, d in zip(factors, direction, strict=True):
        factor.add_(d, alpha=step)


def _dot(one: list[Tensor], other: list[Tensor]) -> float:
    return sum((a * b).sum().item() for a, b in zip(one, other, strict=True))


def load(path: Path = MEASURED) -> list[Condition]:
    """What `measure` has kept."""
    kept = json.loads(path.read_text(encoding="utf-8"))
    return [Condition(name=name, **of) for name, of in kept.items()]


def as_published(conditions: list[Condition], tasks: list[TaskSummary]) -> list[Condition]:
    """The conditions, of which those that are tasks of the study have the best rate of its published search."""
    losses = {task.task: _searched(task.methods[METHOD]) for task in tasks}
    return [
        replace(c, best=interpolated(losses[c.name]), factor=_factor(losses[c.name]))
        if c.name in losses
        else c
        for c in conditions
    ]


def _factor(losses: dict[float, float]) -> float:
    usable = [lr for lr, loss in losses.items() if loss <= 1.02 * min(losses.values())]
    return max(usable) / min(usable)


def save(conditions: list[Condition], path: Path = MEASURED) -> None:
    """Keep conditions, by their names, numbers of six digits."""
    fields = {c.name: {k: v for k, v in asdict(c).items() if k != "name"} for c in conditions}
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, json.loads(json.dumps(fields), parse_float=short))


def table(conditions: list[Condition]) -> Table:
    """Rules in rows: best rate over the rule's of every model's conditions, the worst factor, the mean one."""
    rows = Table(title="best rate over that of a rule fitted on the other models")
    rows.add_column("rule")
    for name in (*(c.name for c in conditions), "worst", "mean"):
        rows.add_column(name, justify="right")
    for title, rule in RULES.items():
        found = left_out(conditions, rule)
        worst, mean = factors_off(found)
        rows.add_row(title, *(f"{v:.2f}" for v in found.values()), f"{worst:.1f}", f"{mean:.2f}")
    return rows


COLUMNS = ("", "rate", "mean of the best", "off by, worst", "off by, mean")


def table_of_pairs(found: dict[str, OfPairs]) -> Table:
    """Optimisers in rows: the package's rate, the one that fits all, how far it is off, what it costs."""
    rows = Table(title="optimisers of pairs: rate, over AdamW's suggestion; what it costs by task")
    models = _models(found)
    for name in (*COLUMNS, *models):
        rows.add_column(name, justify="right")
    for name, of in found.items():
        rows.add_row(*row_of_page(name, of, models))
    return rows


def table_of_starts(found: dict[str, dict[str, float]]) -> Table:
    """Starts in rows: best rate over the suggested one, by the task."""
    rows = Table(title="starts, with AdamW: best rate over the suggestion")
    tasks = sorted({task for of in found.values() for task in of})
    for name in ("", *tasks):
        rows.add_column(name, justify="right")
    for name, of in found.items():
        rows.add_row(*row_of_start(name, of, tasks))
    return rows


def row_of_start(name: str, of: dict[str, float], tasks: list[str]) -> list[str]:
    """A row of that table, as the page has it."""
    return [METHODS[name].title, *(f"{of[t]:.2g}" if t in of else "" for t in tasks)]


def row_of_page(name: str, of: OfPairs, models: list[str]) -> list[str]:
    """A row of the table, as the page has it."""
    worst, mean = factors_off(over_others(of.over_adamw, of.models))
    of_adamw = "" if name in RATES else " of AdamW's"
    losses = [of.worst_excess(model) for model in models]
    return [
        f"`{name}`",
        f"{OF_PACKAGE[name]:.2g}{of_adamw}",
        f"{of.share:.2g}",
        f"{worst:.1f} times",
        f"{mean:.1f} times",
        *("" if loss is None else f"{loss:+.1%}" for loss in losses),
    ]


def _models(found: dict[str, OfPairs]) -> list[str]:
    return list(dict.fromkeys(model for of in found.values() for model in of.models.values()))


def factors_off(found: dict[str, float]) -> tuple[float, float]:
    """The largest and the mean factor by which a rule is off, in either direction."""
    logs = [abs(math.log(ratio)) for ratio in found.values()]
    return math.exp(max(logs)), math.exp(statistics.mean(logs))


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("command", nargs="?", choices=("measure", "report"), default="report")
    parser.add_argument("tasks", nargs="*", metavar="TASK")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--measured", type=Path, default=MEASURED, help="file of what is kept")
    options = parser.parse_args()
    if options.command == "measure":
        prepare_process()
        kept = {c.name: c for c in load(options.measured)} if options.measured.exists() else {}
        for name in options.tasks:
            condition = measure(name, options.results)
            kept[condition.name] = condition
        save(list(kept.values()), options.measured)
    else:
        console, tasks = Console(width=200), load_tasks(STUDY)
        console.print(table(as_published(load(options.measured), tasks)))
        console.print(table_of_starts(of_starts(tasks)))
        console.print(table_of_pairs(of_pairs(tasks)))


if __name__ == "__main__":
    main()
