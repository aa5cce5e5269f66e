"""Fine-tune a model from our start and from plain LoRA, with the same steps and trained numbers.

    scripts/quickstart                 # sets up .venv, then runs this file
    python scripts/quickstart.py       # in an environment that has the extra `quickstart`
    python scripts/quickstart.py --task docstrings [--sweep [METHOD …]]

The task `functions` teaches SmolLM2, a language model, to say in a sentence what a Python function
does; it takes about five minutes on two cores. `docstrings` is a classifier's, with more methods.
Results go to `out/quickstart/`.
"""

import argparse
import os
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import quickstart_docstrings
import quickstart_functions
import transformers

TASKS = {"functions": quickstart_functions, "docstrings": quickstart_docstrings}


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--task", choices=TASKS, default="functions")
    parser.add_argument("--steps", type=int, help="training steps of each run")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="which are compared")
    parser.add_argument("--seed", type=int, default=0, help="of the adapter and the order of rows")
    parser.add_argument("--test-size", type=int, default=400, help="docstrings: rows to test on")
    parser.add_argument(
        "--sweep",
        nargs="*",
        metavar="METHOD",
        help="docstrings: compare learning rates instead",
    )
    arguments = parser.parse_args()
    task = TASKS[arguments.task]
    if arguments.sweep is not None and arguments.task != "docstrings":
        parser.error("--sweep is for --task docstrings; --task functions takes suggested rates")
    if arguments.steps is not None and arguments.steps < 1:
        parser.error(f"--steps must be at least 1, got {arguments.steps}")
    for method in [*(arguments.methods or ()), *(arguments.sweep or ())]:
        if method not in task.METHODS:
            parser.error(f"unknown method {method!r}; --task {arguments.task}: {[*task.METHODS]}")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    task.run(arguments)


if __name__ == "__main__":
    main()
