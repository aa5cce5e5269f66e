"""How far the suggested learning rate is from the best: every task left out once.

    python scripts/rate_rule.py [METHOD …]

Reads what `bench_convergence.py publish` has measured. The rule has one constant
(`peft_gradinit/linalg/rates.py`); what the other tasks would make of it is held against the best rate of
each task, and the loss at the suggested rate against the loss at the best.
"""

import argparse
import math
import statistics
from pathlib import Path

from convergence.methods import METHODS
from convergence.summary import Summary, load
from rich.console import Console
from rich.table import Table

MEASURED = Path(__file__).parent / "convergence" / "measured"


def ratios(of_tasks: dict[str, Summary]) -> dict[str, float]:
    """Best rate over the suggested one, by task."""
    return {
        task: found.lr / found.suggested_lr
        for task, found in of_tasks.items()
        if found.suggested_lr
    }


def left_out(found: dict[str, float]) -> dict[str, float]:
    """Best rate over the one that the rule would suggest if it were fitted on the other tasks."""
    return {
        task: ratio / math.exp(statistics.mean(math.log(r) for t, r in found.items() if t != task))
        for task, ratio in found.items()
    }


def table(method: str, of_tasks: dict[str, Summary]) -> Table:
    """One method on all tasks."""
    rows = Table(title=METHODS[method].title)
    for name in ("task", "best", "suggested", "best / suggested", "left out", "loss there"):
        rows.add_column(name, justify="left" if name == "task" else "right")
    found = ratios(of_tasks)
    alone = left_out(found) if len(found) > 1 else {}
    for task, ratio in found.items():
        of = of_tasks[task]
        there = "" if of.suggested_loss is None else f"{of.suggested_loss / of.loss - 1:+.1%}"
        rates = (f"{of.lr:.2g}", f"{of.suggested_lr:.2g}")
        rows.add_row(task, *rates, f"{ratio:.2f}", f"{alone.get(task, math.nan):.2f}", there)
    return rows


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    suggested = [name for name, method in METHODS.items() if method.suggests]
    parser.add_argument("methods", nargs="*", metavar="METHOD", help="default: all with a rate")
    parser.add_argument("--measured", type=Path, default=MEASURED, help="folder of the summaries")
    options = parser.parse_args()
    if unknown := set(options.methods) - set(suggested):
        parser.error(f"no rate is suggested for {sorted(unknown)}; for these it is: {suggested}")
    tasks = load(options.measured)
    for method in options.methods or suggested:
        of_tasks = {t.task: t.methods[method] for t in tasks if method in t.methods}
        if of_tasks:
            Console().print(table(method, of_tasks))


if __name__ == "__main__":
    main()
