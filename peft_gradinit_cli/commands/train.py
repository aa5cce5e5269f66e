"""`peft-gradinit train`: a recipe, from the model to the evaluated adapter."""

from typing import Annotated

import typer

from ..output import results_alone
from . import options


def train(
    recipe: Annotated[
        str | None, typer.Argument(help="A YAML file, or the name of a recipe that ships.")
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Values that win over the file's.", metavar="[SECTION.KEY=VALUE]..."),
    ] = None,
    names: Annotated[bool, typer.Option("--list", help="List the recipes that ship.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Validate the recipe and stop.")] = False,
    as_json: options.AsJson = False,
) -> None:
    """Fine-tune as a recipe says: model, data, start, training, evaluation, export.

    Several processes: `accelerate launch -m peft_gradinit_cli train RECIPE`. All faults of a recipe
    are shown at once.

        peft-gradinit train --list
        peft-gradinit train offline/pico_llama_docstrings training.max_steps=20 output=out/try
    """
    with results_alone():
        from ..work import train as work

    if names or recipe is None:
        work.names(as_json)
    else:
        work.run(recipe, overrides or (), check=check, as_json=as_json)
