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
