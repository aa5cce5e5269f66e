"""What `peft-gradinit convert` does."""

from pathlib import Path

from peft_gradinit.analysis import convert, initial_update, recomputed_update, residual_update
from peft_gradinit.errors import ConfigError
from peft_gradinit.records import check_place, read_adapter

from ..output import Column, Listing
from .bases import weights_of


def run(
    adapter: str,
    output: Path,
    *,
    initial: str | None,
    base: str | None,
    residual: str | None,
    rank: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Turn an adapter whose start wrote into the base model into plain LoRA.

    Args:
        adapter: the trained one.
        output: folder of the plain one.
        initial: the same adapter as it was after its start.
        base: the original base model.
        residual: the base model as the start left it.
        rank: of the result.
        overwrite: replace what is in `output`.
        as_json: print JSON.

    Raises:
        ConfigError: if it is not told, or told twice, what the start wrote.
    """
    if (initial is None) == (base is None) or (residual is not None and base is None):
        raise ConfigError(
            "give --initial, or --base (with --residual for starts that cannot be computed again)."
        )
    check_place(output, overwrite=overwrite)
    trained = read_adapter(adapter)
    if initial is not None:
        start = initial_update(trained, read_adapter(initial))
    elif residual is not None and base is not None:
        start = residual_update(trained, weights_of(base, trained), weights_of(residual, trained))
    else:
        start = recomputed_update(trained, weights_of(str(base), trained))
    done = convert(trained, start, output, rank=rank, overwrite=overwrite)
    rows = [{"layer": n, "r": done.ranks[n], "error": done.errors[n]} for n in done.ranks]
    columns = (
        Column("layer", "layer"),
        Column("r", "r", "d"),
        Column("error", "relative error", ".2e"),
    )
    worst = max(done.errors.values())
    facts = {"written": str(done.directory), "largest relative error": worst}
    Listing("", columns, rows, facts).show(as_json)
