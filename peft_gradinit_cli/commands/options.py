"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

MODEL, DATA, ADAPTER = "Model", "Data", "Adapter"

AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is there.")]
Base = Annotated[
    str | None,
    typer.Option("--base", help="The original base model: Hub name or folder.", metavar="MODEL"),
]
Task = Annotated[
    str | None,
    typer.Option(
        help="CAUSAL_LM, SEQ_2_SEQ_LM, SEQ_CLS or IMAGE_CLS. Default: as the model's class says.",
        rich_help_panel=MODEL,
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option(
        help="Draw pictures into this folder (needs the extra `plots`).", metavar="FOLDER"
    ),
]
Rank = Annotated[
    int | None, typer.Option(min=1, help="Truncate every layer to this rank, by its SVD.")
]


def needed_by(context: typer.Context, needed: str, value: object, *names: str) -> None:
    """Refuse options that would be ignored, because the one that they belong to is not given.

    Args:
        context: of the command.
        needed: the option that they belong to.
        value: what it is.
        names: of the parameters.

    Raises:
        typer.BadParameter: if one of them is given.
    """
    for name in names:
        source = context.get_parameter_source(name)
        if not value and source is not None and source.name == "COMMANDLINE":
            message = f"means nothing without {needed}; give that, or leave this one out."
            raise typer.BadParameter(message, ctx=context, param_hint=f"--{name}")
