"""Does it converge faster? Every start and its rivals, each at its own best learning rate.

    python scripts/bench_convergence.py run       # hours; goes on where it was if it is interrupted
    python scripts/bench_convergence.py costs     # step time and memory, one method at a time
    python scripts/bench_convergence.py report    # table and pictures from what there is

Results are kept in `out/convergence/results`, one JSON a run, apart for different settings
(`scripts/convergence/configs/`). `--tasks` and `--methods` choose among them; a task may be the path of a file
with settings of your own.
"""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from convergence.costs import measure_costs
from convergence.methods import METHODS
from convergence.report import write_report
from convergence.settings import FOLDER
from convergence.study import Study, carry_out, load_task, prepare_process

OUT = Path("out/convergence")


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("command", choices=("run", "costs", "report"))
    parser.add_argument(
        "--tasks", nargs="+", default=sorted(p.stem for p in FOLDER.glob("*.yaml")), metavar="TASK"
    )
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), metavar="M")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="processes side by side")
    parser.add_argument("--out", type=Path, default=OUT, help="folder of results and report")
    options = parser.parse_args()
    studies = [Study(options.out / "results", task) for task in options.tasks]
    prepare_process()
    if options.command == "run":
        for study in studies:
            load_task(study.task)  # pretrains its model, once, before the others ask for it
        carry_out(studies, options.methods, options.jobs)
    elif options.command == "costs":
        measure_costs(studies, options.methods)
    else:
        sys.stdout.write(write_report(studies, options.methods, options.out) + "\n")


if __name__ == "__main__":
    main()
