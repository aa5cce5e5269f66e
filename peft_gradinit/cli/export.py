"""`peft-gradinit export`: an adapter in the form that is needed."""

from pathlib import Path
from typing import Annotated, get_args

import typer
from peft import PeftModel

from ..errors import ConfigError, GradInitError
from ..export import ExportTarget, export_adapter
from ..files import check_writable
from ..saved import SavedAdapter, read_adapter
from ..tuners import load_for_training, read_provenance
from . import options
from .bases import load_base
from .output import Column, Listing


def export(
    adapter: Annotated[str, typer.Argument(help="A saved adapter: folder or Hub name.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
    base: Annotated[
        str | None,
        typer.Option(
            help="Its base model. Default: the one that the adapter names.", metavar="MODEL"
        ),
    ] = None,
    target: Annotated[
        str, typer.Option(help="peft, serving (vLLM, SGLang, TGI) or merged.")
    ] = "peft",
    rank: options.Rank = None,
    overwrite: options.Overwrite = False,
    as_json: options.AsJson = False,
) -> None:
    """Write an adapter for PEFT, for inference servers, or merged into its base model.

    **peft** is what `save_pretrained` writes. **serving** has one rank that servers accept, the
    scaling inside the weights, and no patterns. **merged** is the whole model.

        peft-gradinit export out/lora_ga out/serving --base MODEL --target serving --rank 16
    """
    if target not in get_args(ExportTarget):
        raise ConfigError(f"--target must be one of {get_args(ExportTarget)}, got {target!r}.")
    check_writable(output.parent)
    saved = read_adapter(adapter)
    saved.check_untouched_base()
    name = base or saved.config.base_model_name_or_path
    if not name:
        raise ConfigError(f"{adapter!r} does not name its base model; give --base.")
    peft_model = _loaded(saved, name)
    report = export_adapter(
        peft_model,
        output,
        target,  # pyright: ignore[reportArgumentType] checked above
        rank,
        overwrite=overwrite,
    )
    rows = [
        {"layer": x.name, "r": x.r, "exported_r": x.exported_r, "error": x.relative_error}
        for x in report.layers
    ]
    columns = (
        Column("layer", "layer"),
        Column("r", "r", "d"),
        Column("exported_r", "exported", "d"),
        Column("error", "relative error", ".2e"),
    )
    facts = {"written": str(output), "target": target, "rank": report.rank}
    facts["largest relative error"] = report.largest_error
    Listing("", columns, rows, facts).show(as_json)


def _loaded(saved: SavedAdapter, base: str) -> PeftModel:
    """The adapter in its live form if it is from this package, else as PEFT loads it."""
    model = load_base(base, saved)
    try:
        read_provenance(saved.directory)
    except GradInitError:
        return PeftModel.from_pretrained(model, saved.directory)
    return load_for_training(model, saved.directory)
