"""What `peft-gradinit train` does."""

from collections.abc import Iterable
from typing import Any

import datasets

from peft_gradinit.layouts import process_state
from peft_gradinit.recipes import finetune, load_recipe
from peft_gradinit.recipes.shipped import shipped

from ..output import Column, Listing, print_json, results_alone


def names(as_json: bool) -> None:
    """List the recipes that ship.

    Args:
        as_json: print JSON.
    """
    rows = []
    for name, path in shipped().items():
        recipe = load_recipe(path)
        model, method = recipe.model.name, recipe.method.name
        rows.append({"recipe": name, "method": method, "model": model, "title": recipe.title})
    columns = (
        Column("recipe", "recipe"),
        Column("method", "method", rank=1),
        Column("model", "model", "name"),
    )
    Listing("", columns, rows).show(as_json)


def run(recipe: str, overrides: Iterable[str], *, check: bool, as_json: bool) -> None:
    """Run a recipe, and print what it gave.

    Args:
        recipe: a file, or the name of one that ships.
        overrides: `section.key=value`.
        check: validate it and stop.
        as_json: print JSON.
    """
    datasets.disable_progress_bars()
    wanted = load_recipe(recipe, overrides)
    if check:
        print_json(wanted.model_dump(mode="json"))
        return
    with results_alone():
        results = finetune(wanted)
    if process_state().is_main_process:
        Listing("", (), [], _facts(results, wanted.output)).show(as_json)


def _facts(results: dict[str, Any], output: str) -> dict[str, Any]:
    losses = [loss for _, loss in results["losses"]]
    tail = losses[-max(1, len(losses) // 10) :]
    facts = {"recipe": results["title"], "method": results["method"]}
    facts |= {"trained numbers": results["trainable"], "learning rate": results["learning_rate"]}
    if tail:
        facts |= {"first loss": losses[0], "last loss": sum(tail) / len(tail)}
    for name, value in results["metrics"].items():
        facts["evaluation loss" if name == "loss" else name.removeprefix("metric_")] = value
    return {**facts, "written": output}
