"""Settings that differ from a task's in the number of seeds alone: rows that were run with further seeds."""

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from .methods import METHODS
from .report import difference, interval, name_of
from .settings import Settings, load_settings
from .study import BASELINE, Study, final_loss
from .summary import write_rounded

COLUMNS = ("rate", "loss", "next to LoRA", "further seeds: loss", "next to LoRA")


@dataclass(frozen=True)
class Row:
    """A method at one rate.

    Attributes:
        method: name.
        lr: learning rate.
        losses: final test loss of every seed, the reported ones of the task first.
    """

    method: str
    lr: float
    losses: list[float]


@dataclass(frozen=True)
class FurtherSeeds:
    """Rows of a task with further seeds.

    Attributes:
        task: name.
        n_reported: how many of the seeds are those that the task reports.
        rows: LoRA's first.
    """

    task: str
    n_reported: int
    rows: list[Row]


def differs_in_seeds(settings: Settings) -> bool:
    """Whether settings are a task's own but for the number of reported seeds."""
    own = load_settings(settings.task)
    return settings != own and settings.model_copy(update={"seeds": own.seeds}) == own


def collect(study: Study, earlier: Iterable[FurtherSeeds] = ()) -> FurtherSeeds:
    """The rows whose whole runs are there for all seeds; LoRA's at its best rate is one of them.

    Args:
        study: of the task's settings with more seeds.
        earlier: what was kept, of any tasks; a row that has no runs here is taken from it.
    """
    found: dict[tuple[str, float], dict[int, float]] = {}
    for method in METHODS:
        for run in study.runs(method):
            if run["seed"] in study.settings.reported and run["steps"] == study.trained(method):
                found.setdefault((method, run["lr"]), {})[run["seed"]] = final_loss(run)
    kept = {(r.method, r.lr): r for f in earlier if f.task == study.settings.task for r in f.rows}
    here = {
        (method, lr): Row(method, lr, [losses[seed] for seed in study.settings.reported])
        for (method, lr), losses in found.items()
        if len(losses) == study.settings.seeds
    }
    rows = list((kept | here).values())
    rows.sort(key=lambda row: (row.method != BASELINE, list(METHODS).index(row.method), row.lr))
    return FurtherSeeds(study.settings.task, load_settings(study.settings.task).seeds, rows)


def save(further: FurtherSeeds, folder: Path) -> None:
    """Keep the rows, numbers of six digits."""
    write_rounded(folder / f"{further.task}.json", asdict(further))


def load(folder: Path) -> list[FurtherSeeds]:
    """What was kept, by task."""
    read = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(folder.glob("*.json"))]
    return [FurtherSeeds(**{**of, "rows": [Row(**row) for row in of["rows"]]}) for of in read]


def table(tasks: list[FurtherSeeds]) -> str:
    """All rows as Markdown tables, one a task: all seeds, and the further ones alone."""
    return "\n\n".join(map(_table, tasks))


def _table(task: FurtherSeeds) -> str:
    lines = [f"| {task.task} | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    baseline = task.rows[0]
    for row in task.rows:
        cells = [f"{row.lr:.2g}"]
        for first in (0, task.n_reported):
            losses, of_lora = row.losses[first:], baseline.losses[first:]
            cells.append(interval(losses))
            cells.append("" if row is baseline else difference(losses, of_lora))
        lines.append(f"| {name_of(row.method)} | {' | '.join(cells)} |")
    return "\n".join(lines)
