#!/usr/bin/env python
"""Run a recipe: `accelerate launch scripts/finetune.py configs/FILE.yaml [section.key=value …]`.

The keys are in configs/README.md. `--check` validates the recipe and stops.
"""

import argparse
import sys
import warnings

import datasets
import transformers
from accelerate import PartialState
from rich.console import Console

from peft_gradinit import GradInitError
from peft_gradinit.recipes import finetune, load_recipe

console = Console()


def main() -> None:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config", help="a recipe, see configs/")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    parser.add_argument("--check", action="store_true", help="validate the recipe and stop")
    arguments = parser.parse_args()
    try:
        recipe = load_recipe(arguments.config, arguments.overrides)
        if arguments.check:
            console.print_json(data=recipe.model_dump(mode="json"))
            return
        results = finetune(recipe)
    except GradInitError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    if PartialState().is_main_process:
        show(results, recipe.output)


def show(results: dict, output: str) -> None:
    """Print what the run gave."""
    losses = [loss for _, loss in results["losses"]]
    tail = losses[-max(1, len(losses) // 10) :]
    console.print(f"{results['title']}: {results['method']}", highlight=False)
    console.print(f"trainable numbers: {results['trainable']:,}", highlight=False)
    if tail:
        console.print(f"loss: {losses[0]:.4f} to {sum(tail) / len(tail):.4f}", highlight=False)
    for name, value in results["metrics"].items():
        console.print(f"{name.removeprefix('metric_')}: {value:.4f}", highlight=False)
    console.print(f"written to {output}", highlight=False)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    datasets.disable_progress_bars()
    main()
