"""`peft-gradinit convert`: adapters whose start wrote into the base, freed of it."""

from pathlib import Path
from typing import Annotated

import typer

from ..errors import ConfigError
from ..files import check_writable
from ..saved import (
    convert as run_conversion,
)
from ..saved import (
    initial_update,
    read_adapter,
    recomputed_update,
    residual_update,
)
from . import options
from .bases import weights_of
from .output import Column, Listing


def convert(
    adapter: Annotated[
        str, typer.Argument(help="A trained PiSSA, OLoRA, CorDA or PEFT-LoRA-GA adapter.")
    ],
    output: Annotated[Path, typer.Argument(help="Folder of the plain LoRA adapter.")],
    initial: Annotated[
        str | None,
        typer.Option(help="The same adapter, saved right after get_peft_model.", metavar="FOLDER"),
    ] = None,
    base: options.Base = None,
    residual: Annotated[
        str | None,
        typer.Option(
            help="The base model as its start left it; needs --base, too.", metavar="MODEL"
        ),
    ] = None,
    rank: options.Rank = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Turn an adapter whose start wrote into the base model into plain LoRA on the untouched base.

    PEFT's PiSSA, OLoRA, CorDA and LoRA-GA train beside `W - s B0 A0`. On the original model such a
    file computes something else. What has to be known is `s B0 A0`:

    - **--initial**: from the adapter as it was saved right after its start (always works);
    - **--base** alone: computed from the original weights again (PiSSA with the full SVD, OLoRA);
    - **--base and --residual**: the difference of the original and the overwritten model.

    The result has twice the rank and is exact; --rank truncates it and says what that loses.

        peft-gradinit convert out/pissa out/plain --base MODEL
    """
    if (initial is None) == (base is None) or (residual is not None and base is None):
        raise ConfigError(
            "give --initial, or --base (with --residual for starts that cannot be computed again)."
        )
    check_writable(output.parent)
    trained = read_adapter(adapter)
    if initial is not None:
        start = initial_update(trained, read_adapter(initial))
    elif residual is not None and base is not None:
        start = residual_update(trained, weights_of(base, trained), weights_of(residual, trained))
    else:
        start = recomputed_update(trained, weights_of(str(base), trained))
    done = run_conversion(trained, start, output, rank=rank, overwrite=overwrite)
    rows = [{"layer": n, "r": done.ranks[n], "error": done.errors[n]} for n in done.ranks]
    columns = (
        Column("layer", "layer"),
        Column("r", "r", "d"),
        Column("error", "relative error", ".2e"),
    )
    worst = max(done.errors.values())
    facts = {"written": str(done.directory), "largest relative error": worst}
    Listing("", columns, rows, facts).show(as_json)
