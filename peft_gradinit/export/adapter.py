"""`export_adapter`: an adapter written for PEFT, for inference servers, or merged into its base."""

import dataclasses
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast, get_args

from peft import LoraConfig, PeftModel, PeftType
from peft.utils import SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ExportError
from ..files import whole_folder, write_json
from ..layouts import uncompiled
from ..linalg import Factors
from ..numbers import as_python, is_integer
from ..records import (
    A_KEY,
    CARD,
    EXPORT_FORMAT,
    OUT_OF_ATTENTION,
    PREFIX,
    PROVENANCE_FILE,
    as_text,
    complete_card,
    entries,
    facts_of,
    hub_id,
    linear_layers,
    new_card,
    plain_config,
    record_of,
    saved,
    table_of,
    told_record,
    unscaled,
    write_card,
)
from ..starts import GradInitConfig, SpectralConfig
from .checks import check_base, check_truncatable
from .merging import check_mergeable, merged_model
from .places import PROCESSING_FILES, is_exported, save_processor
from .serving import check_servable, completed, served_rank, target_names

if TYPE_CHECKING:
    from rich.table import Table

ExportTarget = Literal["peft", "serving", "merged"]


@dataclasses.dataclass(frozen=True)
class ExportedLayer:
    """One layer of an exported adapter.

    Attributes:
        name: full name in the base model.
        r: rank in the saved adapter (LoRA-GA: twice the live one); 0 for a layer without one.
        exported_r: rank after truncation, before any padding.
        relative_error: `|B A - B' A'|_F / |B A|_F` of the truncation; 0 if there was none.
    """

    name: str
    r: int
    exported_r: int
    relative_error: float


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """Ranks and errors of an export; prints as a table.

    Attributes:
        target: `"peft"`, `"serving"` or `"merged"`.
        rank: the one rank of all layers for `"serving"`; the largest for `"peft"`; 0 without
            factors.
        layers: one line per layer with factors.
    """

    target: ExportTarget
    rank: int
    layers: tuple[ExportedLayer, ...]

    @property
    def largest_error(self) -> float:
        """The largest relative error of a layer; 0 if nothing was truncated."""
        return max((layer.relative_error for layer in self.layers), default=0.0)

    def to_dict(self) -> dict[str, Any]:
        """The report as plain dicts and lists, for JSON."""
        return dataclasses.asdict(self)

    def summary(self) -> str:
        """One line about all layers."""
        if self.target == "merged":
            return "merged: the base model with the adapter taken in"
        error = f"largest relative error {self.largest_error:.2e}"
        kept = "every layer exact" if self.largest_error == 0 else error
        return f"{self.target}: {len(self.layers)} layers, rank {self.rank}, {kept}"

    def table(self) -> "Table":
        """The layers as a rich table."""
        rows = []
        for layer in self.layers:
            error = f"{layer.relative_error:.2e}" if layer.relative_error else ""
            rows.append((layer.name, str(layer.r), str(layer.exported_r), error))
        columns = [("layer", False), ("r", True), ("exported", True), ("error", True)]
        return table_of(columns, rows)

    def __str__(self) -> str:
        if not self.layers:
            return self.summary()
        return f"{self.summary()}\n\n{as_text(self.table())}"


def export_adapter(
    peft_model: PeftModel,
    directory: str | os.PathLike[str],
    target: ExportTarget = "peft",
    rank: int | None = None,
    adapter_name: str = "default",
    *,
    overwrite: bool = False,
    processing_class: Any = None,
) -> ExportReport:
    """Write an adapter in the form that its reader needs; the model is only read.

    - `"peft"`: the files of `save_pretrained`, in one directory whatever the adapter's name.
    - `"serving"`: for vLLM, SGLang, TGI and others that know one rank and one scale. All layers are
      padded with zeros to a rank that servers accept, the scale is folded into the factors
      (`lora_alpha == r`), and there are no patterns. If some layers of a kind have an adapter, the
      others of that kind get one that is zero.
    - `"merged"`: the base model with the adapter merged, as transformers saves a model, in the
      base's dtype. Serves everything that PEFT can merge, such as DoRA and whole modules.

    The directory is written whole or not at all, and after an error it is as before.

    Args:
        peft_model: a model with a LoRA adapter, of this package or of PEFT; also a compiled one.
        directory: where to write; new or empty, unless `overwrite`.
        target: the form.
        rank: truncate every layer to this rank, by the singular value decomposition of its
            product; for `"peft"` and `"serving"`. Default: no truncation.
        adapter_name: which adapter.
        overwrite: replace an earlier export, as a whole. A directory with other files is never
            replaced.
        processing_class: tokenizer or processor, saved beside a `"merged"` model, which then loads alone.
            Default: none.

    Returns:
        Ranks and relative errors by layer, also written to `gradinit.json`.

    Raises:
        ExportError: if the options, the adapter or the directory do not fit the target; the message
            says what to do instead.
        OutputError: if the disk is full, or the directory cannot be written to.
    """
    rank, peft_model = as_python(rank), uncompiled(peft_model)
    config = _checked_config(peft_model, target, rank, adapter_name)
    if processing_class is not None and target != "merged":
        raise ExportError(
            f"target={target!r} writes an adapter, which takes the tokenizer of its base; leave "
            "processing_class out, or save it yourself."
        )
    files: list[str] = []
    with whole_folder(directory, overwrite=overwrite, is_ours=is_exported(directory)) as part:
        state_dict = _saved_entries(peft_model, adapter_name, embeddings=target != "merged")
        if target == "merged":
            report = ExportReport(target, 0, ())
            merged_model(peft_model.get_base_model(), adapter_name).save_pretrained(part)
            new_card(part)
            files = [] if processing_class is None else save_processor(processing_class, part)
        elif target == "peft" and rank is None:
            saved_as = _saved_config(peft_model, adapter_name)
            report = _report(target, linear_layers(state_dict, saved_as)[0])
            _save_as_peft(peft_model, part, adapter_name)
            return report
        else:
            plain, weights, report = _truncated(peft_model, adapter_name, state_dict, target, rank)
            save_file(weights, part / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            plain.save_pretrained(str(part), auto_mapping_dict=_auto_mapping(peft_model, plain))
            write_card(peft_model, part)
        facts = facts_of(config, told_record(peft_model, adapter_name))
        facts |= {"export": report.to_dict(), PROCESSING_FILES: files}
        write_json(part / PROVENANCE_FILE, {"format": EXPORT_FORMAT, **facts})
        saved(part)
    return report


def check_export(
    peft_model: PeftModel,
    target: ExportTarget,
    rank: int | None = None,
    adapter_name: str = "default",
) -> None:
    """Refuse what `export_adapter` would refuse, before an adapter is trained; arguments as there."""
    peft_model = uncompiled(peft_model)
    _checked_config(peft_model, target, rank, adapter_name)
    if target == "merged":
        check_mergeable(peft_model.get_base_model(), adapter_name)
    elif target == "serving" or rank is not None:
        entries = _saved_entries(peft_model, adapter_name, embeddings=True)
        _truncated(peft_model, adapter_name, entries, target, rank)


def _checked_config(
    peft_model: Any, target: str, rank: int | None, adapter_name: str
) -> LoraConfig | SpectralConfig:
    if target not in get_args(ExportTarget):
        raise ExportError(f"target must be one of {get_args(ExportTarget)}, got {target!r}.")
    if not isinstance(peft_model, PeftModel):
        raise ExportError(
            f"export_adapter expects a PeftModel, got {type(peft_model).__name__}; pass what "
            "get_peft_model or PeftModel.from_pretrained returned (trainer.model, unwrapped)."
        )
    if adapter_name not in peft_model.peft_config:
        raise ExportError(
            f"there is no adapter {adapter_name!r}; the model has {sorted(peft_model.peft_config)}."
        )
    config = peft_model.peft_config[adapter_name]
    ours = isinstance(config, GradInitConfig | SpectralConfig)
    if not ours and config.peft_type != PeftType.LORA:
        raise ExportError(
            f"export_adapter writes LoRA adapters, and {adapter_name!r} is of type "
            f"{PeftType(config.peft_type).value}; use save_pretrained."
        )
    if rank is not None and (not is_integer(rank) or rank < 1):
        raise ExportError(f"rank must be a positive integer or None, got {rank!r}.")
    if rank is not None and target == "merged":
        raise ExportError(
            f"target='merged' writes no factors that rank={rank} could truncate; leave rank out."
        )
    return cast("LoraConfig | SpectralConfig", config)


def _saved_entries(
    peft_model: PeftModel, adapter_name: str, *, embeddings: bool
) -> dict[str, Tensor]:
    """The entries of the adapter as plain LoRA, even if its config asks for the compact form."""
    config = cast("Any", peft_model.peft_config[adapter_name])
    compact = isinstance(config, SpectralConfig) and not config.saves_lora
    if compact:
        config.save_format = "lora"
    try:
        return get_peft_model_state_dict(
            peft_model,
            adapter_name=adapter_name,
            save_embedding_layers="auto" if embeddings else False,
        )
    finally:
        if compact:
            config.save_format = "compact"


def _saved_config(peft_model: PeftModel, adapter_name: str) -> LoraConfig:
    config: Any = peft_model.peft_config[adapter_name]
    record = record_of(peft_model, adapter_name)
    return plain_config(config) if record is None else config.saved_config(record)


def _save_as_peft(peft_model: PeftModel, part: Path, adapter_name: str) -> None:
    peft_model.save_pretrained(str(part), selected_adapters=[adapter_name])
    if adapter_name == "default":
        return
    for path in (part / adapter_name).iterdir():
        path.replace(part / path.name)
    shutil.rmtree(part / Path(adapter_name).parts[0])
    (part / CARD).unlink()  # it names the folder that the adapter was in
    write_card(peft_model, part)
    complete_card(part)


def _truncated(
    peft_model: PeftModel,
    adapter_name: str,
    state_dict: Mapping[str, Tensor],
    target: ExportTarget,
    rank: int | None,
) -> tuple[LoraConfig, dict[str, Tensor], ExportReport]:
    """Config, entries and report of the adapter with the scaling in its factors."""
    saved = _saved_config(peft_model, adapter_name)
    saved.inference_mode = True
    exact, others = linear_layers(state_dict, saved)
    check_base(saved, target)
    if target == "serving":
        # PEFT copies the base weight of an adapted head into the file. Servers have it already.
        copies = {f"{PREFIX}{name}.base_layer.weight" for name in exact}
        of_attention = {name for name in exact if name.endswith(OUT_OF_ATTENTION)}
        check_servable(saved, (others.keys() - copies) | of_attention)
    elif rank is not None:
        check_truncatable(saved, others)
    layers, errors = dict(exact), dict.fromkeys(exact, 0.0)
    for name, factors in exact.items() if rank else ():
        layers[name], errors[name] = factors.truncated(cast("int", rank))
    report = _report(target, exact, layers, errors)
    model = peft_model.get_base_model()
    if target == "peft":
        written, options = layers, {}
    else:
        served = served_rank(layers)
        written = completed({name: f.padded(served) for name, f in layers.items()}, model)
        added = tuple(ExportedLayer(name, 0, 0, 0.0) for name in written if name not in layers)
        report = dataclasses.replace(report, rank=served, layers=report.layers + added)
        options = {"base_model_name_or_path": hub_id(_base_name(peft_model, saved))}
    # No exclude_modules, which PEFT knows since 0.14.
    absent = dict.fromkeys(("exclude_modules", "layers_to_transform", "layers_pattern"))
    adapted = [name for name in written if not name.endswith(OUT_OF_ATTENTION)]
    ranks = {name: written[name].r for name in adapted}
    targets = target_names(adapted, model)
    config = unscaled(saved, ranks, target_modules=targets, **absent, **options)
    like = next(t for key, t in state_dict.items() if key.endswith(A_KEY))
    own = {key: tensor.to(like.dtype) for key, tensor in entries(written).items()}
    return config, {**({} if target == "serving" else others), **own}, report


def _report(
    target: ExportTarget,
    exact: Mapping[str, Factors],
    layers: Mapping[str, Factors] | None = None,
    errors: Mapping[str, float] | None = None,
) -> ExportReport:
    layers, errors = layers or exact, errors or {}
    lines = tuple(
        ExportedLayer(name, exact[name].r, factors.r, errors.get(name, 0.0))
        for name, factors in layers.items()
    )
    return ExportReport(target, max((line.exported_r for line in lines), default=0), lines)


def _base_name(peft_model: PeftModel, saved: LoraConfig) -> str | None:
    return saved.base_model_name_or_path or getattr(
        peft_model.get_base_model(), "name_or_path", None
    )


def _auto_mapping(peft_model: PeftModel, saved: LoraConfig) -> dict[str, str] | None:
    """The entry of `save_pretrained` by which `AutoPeftModel` finds the base class."""
    if saved.task_type is not None:
        return None
    base = type(peft_model.get_base_model())
    return {"base_model_class": base.__name__, "parent_library": base.__module__}
