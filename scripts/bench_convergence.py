"""Does it converge faster? Every start and its rivals, each at its own best learning rate.

    python scripts/bench_convergence.py run       # hours; goes on where it was if it is interrupted
    python scripts/bench_convergence.py costs     # step time and memory, each method in a process of its own
    python scripts/bench_convergence.py changes   # intruder dimensions, sizes of changes; a run for each method
    python scripts/bench_convergence.py report    # table and pictures from what there is
    python scripts/bench_convergence.py draw      # the published table and pictures again, from the summaries kept
    python scripts/bench_convergence.py publish   # the same into scripts/convergence/measured and docs/benchmarks/

Rows that are published stay in the report and in what is published, if no runs of theirs are there.
Results are kept in `out/convergence/results`, one JSON a run, apart for different settings
(`scripts/convergence/configs/`). `--tasks` and `--methods` choose among them; a task may be the path of a file
with settings of your own. `--device cuda` trains on a GPU; take few `--jobs` then.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# The C library would give back the memory of every tensor, and its pages would be cleared again: a fifth of
# the time on a CPU. Its settings are read by the processes that train.
os.environ.setdefault("MALLOC_MMAP_MAX_", "0")
os.environ.setdefault("MALLOC_TRIM_THRESHOLD_", str(2**36))
os.environ.setdefault("MALLOC_TOP_PAD_", str(2**28))

from convergence import further
from convergence.changes import measure_changes
from convergence.costs import measure_costs
from convergence.further import differs_in_seeds
from convergence.levers import LEVERS
from convergence.methods import METHODS
from convergence.pair_levers import PAIR_LEVERS
from convergence.report import (
    at_a_glance,
    beside,
    longer,
    overview,
    shorter,
    without_sweep,
    write_report,
)
from convergence.settings import FOLDER, Settings, load_settings
from convergence.study import PARTS, Study, carry_out, load_task, prepare_process
from convergence.summary import TaskSummary, load, save, summarise_task

USUAL = [name for name in METHODS if name not in LEVERS | PAIR_LEVERS]
COMMANDS = ("run", "costs", "changes", "report", "draw", "publish")
OUT = Path("out/convergence")
MEASURED = Path(__file__).parent / "convergence" / "measured"
FURTHER = MEASURED / "further"
PAGES = Path(__file__).parents[1] / "docs" / "benchmarks"


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument(
        "--tasks", nargs="+", default=sorted(p.stem for p in FOLDER.glob("*.yaml")), metavar="TASK"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=USUAL, metavar="M")
    parser.add_argument(
        "--only",
        choices=PARTS,
        help="of `run`: no more than the search for the learning rate; or the shorter or longer runs alone",
    )
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side")
    parser.add_argument("--device", default="cpu", help="where to train: cpu, cuda, cuda:1, …")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of results and report")
    options = parser.parse_args()
    if options.command == "draw":
        _publish()
        return
    studies = [_study(options.out / "results", task) for task in options.tasks]
    if fault := _fault(options.command, studies):
        parser.error(fault)
    prepare_process()
    if options.command == "run":
        for study in studies:
            load_task(study.task)  # pretrains its model, once, before the others ask for it
        carry_out(
            studies,
            options.methods,
            options.jobs,
            options.device,
            options.only,
        )
    elif options.command == "costs":
        measure_costs(studies, options.methods, options.jobs, options.device)
    elif options.command == "changes":
        measure_changes(studies, options.methods, options.jobs, options.device)
    else:
        _report(studies, options)


def _report(studies: list[Study], options: argparse.Namespace) -> None:
    """Save the summaries, and write the report or publish it."""
    publish = options.command == "publish"
    if publish and differs_in_seeds(studies[0].settings):
        earlier = further.load(FURTHER)
        for study in studies:
            further.save(further.collect(study, earlier), FURTHER)
        _publish()
        return
    tasks = _summaries(studies, options)
    if not tasks:
        return
    summaries = MEASURED if publish else options.out / "summaries"
    for task in tasks:
        save(task, summaries)
    if publish:
        _publish()
    else:
        kept = [task for task in load(summaries) if task.task in {t.task for t in tasks}]
        sys.stdout.write(write_report(kept, options.out) + "\n")


def _publish() -> None:
    """Report and pictures beside the summaries that are kept, and the tables into the pages."""
    tasks = load(MEASURED)
    sys.stdout.write(write_report(tasks, MEASURED) + "\n")
    for what, text in shown(tasks).items():
        begin, end = marks(what)
        page = page_of(what)
        before, rest = page.read_text(encoding="utf-8").split(begin)
        _, after = rest.split(end)
        page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}", encoding="utf-8")


def shown(tasks: list[TaskSummary]) -> dict[str, str]:
    """The tables that the pages have."""
    return {
        "at a glance": at_a_glance(tasks),
        "equal numbers": overview(tasks),
        "without a sweep": without_sweep(tasks),
        "shorter runs": shorter(tasks),
        "longer runs": longer(tasks),
        "costs and changes": beside(tasks),
        "further seeds": further.table(further.load(FURTHER)),
    }


def marks(what: str) -> tuple[str, str]:
    """Where a table begins and ends in its page."""
    return f"<!-- {what}: made by bench_convergence.py publish -->", f"<!-- {what}: end -->"


def page_of(what: str) -> Path:
    """The one page that has a table."""
    begin, _ = marks(what)
    (page,) = (p for p in sorted(PAGES.glob("*.md")) if begin in p.read_text(encoding="utf-8"))
    return page


def _fault(command: str, studies: list[Study]) -> str | None:
    """Why figures of settings that are not a task's own would be taken for them, if they would."""
    names = [study.settings.task for study in studies]
    paths = [study.task for study in studies if study.task.endswith(".yaml")]
    further_seeds = [differs_in_seeds(study.settings) for study in studies]
    if command == "publish" and paths and not all(further_seeds):
        return (
            f"publish takes tasks by their names, or settings with more seeds than a task alone, got "
            f"{paths}; report shows other settings"
        )
    if command == "report" and len(set(names)) < len(names):
        return f"a task has one report, got settings of {names}; report them one at a time"
    return None


def _study(folder: Path, task: str) -> Study:
    earlier = _published(load_settings(task))
    return Study(folder, task, earlier.searches() if earlier else None)


def _published(settings: Settings) -> TaskSummary | None:
    """What is published of a task with the same settings."""
    return next((t for t in load(MEASURED) if t.key == settings.key), None)


def _summaries(studies: list[Study], options: argparse.Namespace) -> list[TaskSummary]:
    found = {}
    for study in studies:
        earlier = _published(study.settings)
        found[study.settings.task] = summarise_task(study, options.methods, earlier)
    for name in (n for n, summary in found.items() if summary is None):
        print(f"{name}: the search for LoRA's learning rate is not over.")
    return [summary for summary in found.values() if summary is not None]


if __name__ == "__main__":
    main()
