"""What `peft-gradinit export` does."""

from pathlib import Path
from typing import Any, get_args

from peft import PeftModel

from peft_gradinit.errors import AdapterError, ConfigError, GradInitError
from peft_gradinit.export import ExportTarget, check_directory, export_adapter
from peft_gradinit.records import SavedAdapter, read_adapter, read_provenance
from peft_gradinit.tuners import load_for_training, unknown_entries

from ..output import Column, Listing
from .bases import load_base, load_processor


def run(
    adapter: str,
    output: Path,
    *,
    base: str | None,
    target: str,
    rank: int | None,
    overwrite: bool,
    as_json: bool,
) -> None:
    """Write an adapter in the form that is needed.

    Args:
        adapter: folder or Hub name.
        output: folder to write.
        base: its base model. Default: the one that the adapter names.
        target: which form.
        rank: to which every layer is truncated.
        overwrite: replace what is in `output`.
        as_json: print JSON.

    Raises:
        ConfigError: if there is no such form, or no base model is named.
    """
    if target not in get_args(ExportTarget):
        raise ConfigError(f"--target must be one of {get_args(ExportTarget)}, got {target!r}.")
    check_directory(output, overwrite=overwrite)
    saved = read_adapter(adapter, for_merging=target != "serving" and rank is None)
    saved.check_untouched_base()
    name = base or saved.config.base_model_name_or_path
    if not name:
        raise ConfigError(f"{adapter!r} does not name its base model; give --base.")
    peft_model = _loaded(saved, name)
    processor = load_processor(saved.directory, name) if target == "merged" else None
    report = export_adapter(
        peft_model,
        output,
        target,  # pyright: ignore[reportArgumentType] checked above
        rank,
        overwrite=overwrite,
        processing_class=processor,
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
    facts: dict[str, Any] = {"written": str(output), "target": target}
    if target == "merged":
        facts["tokenizer or processor"] = "none found" if processor is None else "written"
    else:  # a merged model has no factors any more
        facts |= {"rank": report.rank, "largest relative error": report.largest_error}
    Listing("", columns, rows, facts).show(as_json)


def _loaded(saved: SavedAdapter, base: str) -> PeftModel:
    """The adapter in its live form if it is from this package, else as PEFT loads it.

    Raises:
        AdapterError: if the file holds what the base model has no place for, such as another head.
    """
    model = load_base(base, saved)
    try:
        read_provenance(saved.directory)
    except GradInitError:
        peft_model = PeftModel.from_pretrained(model, saved.directory)
    else:
        return load_for_training(model, saved.directory)
    result = peft_model.load_adapter(saved.directory, "default")  # the first gives no result
    if lost := unknown_entries(peft_model, result, "default"):
        raise AdapterError(
            f"{saved.directory!r} holds {len(lost)} entries that {base!r}, loaded as "
            f"{type(model).__name__}, has no place for ({lost[0]}, …), so they would be lost; give the "
            "model that it was trained on, or the right task_type in its adapter_config.json."
        )
    return peft_model
