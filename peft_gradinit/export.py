"""`export_adapter`: an adapter written for PEFT, for inference servers, or merged into its base."""

import copy
import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args

from peft import LoraConfig, PeftModel, PeftType
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, get_peft_model_state_dict
from rich.console import Console
from rich.table import Table
from safetensors.torch import save_file
from torch import Tensor

from .errors import ExportError
from .files import whole_folder, write_json
from .merging import merged_model
from .model_card import CARD, PICTURE, complete_card, new_card
from .serving import (
    PREFIX,
    Layer,
    check_servable,
    completed,
    entries,
    linear_layers,
    served_rank,
    target_names,
)
from .tuners import GradInitConfig, SpectralConfig
from .tuners.provenance import EXPORT_FORMAT, FILE_NAME, facts_of
from .tuners.publishing import hub_id, saved

ExportTarget = Literal["peft", "serving", "merged"]

_SAFE_STARTS = (True, False, "gaussian", "orthogonal", "eva")
"""`init_lora_weights` of PEFT after which the base weights are what they were."""

_FILES = (CONFIG_NAME, FILE_NAME, CARD, PICTURE, "config.json", "generation_config.json")
_WEIGHTS = re.compile(r"(adapter_)?model.*\.(safetensors|bin|safetensors\.index\.json)")


@dataclasses.dataclass(frozen=True)
class ExportedLayer:
    """One layer of an exported adapter.

    Attributes:
        name: full name in the base model.
        r: rank that it had in the saved adapter (LoRA-GA: twice the live one); 0 if it had none.
        exported_r: rank that it was truncated to, before any padding.
        relative_error: `|B A - B' A'|_F / |B A|_F` of the truncation; 0 if there was none.
    """

    name: str
    r: int
    exported_r: int
    relative_error: float


@dataclasses.dataclass(frozen=True)
class ExportReport:
    """What an export wrote; prints as a table.

    Attributes:
        target: `"peft"`, `"serving"` or `"merged"`.
        rank: the one rank of all layers for `"serving"`; the largest for `"peft"`; 0 if there are no
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
        """One line about the whole."""
        if self.target == "merged":
            return "merged: the base model with the adapter taken in"
        error = f"largest relative error {self.largest_error:.2e}"
        kept = "every layer exact" if self.largest_error == 0 else error
        return f"{self.target}: {len(self.layers)} layers, rank {self.rank}, {kept}"

    def table(self) -> Table:
        """The layers as a rich table."""
        table = Table(title=None, box=None, pad_edge=False)
        table.add_column("layer", overflow="fold")
        for column in ("r", "exported", "error"):
            table.add_column(column, justify="right")
        for layer in self.layers:
            error = f"{layer.relative_error:.2e}" if layer.relative_error else ""
            table.add_row(layer.name, str(layer.r), str(layer.exported_r), error)
        return table

    def __str__(self) -> str:
        if not self.layers:
            return self.summary()
        console = Console(width=120, no_color=True)
        with console.capture() as captured:
            console.print(self.table())
        lines = (line.rstrip() for line in captured.get().splitlines())
        return self.summary() + "\n\n" + "\n".join(lines)


def export_adapter(
    peft_model: PeftModel,
    directory: str | os.PathLike[str],
    target: ExportTarget = "peft",
    rank: int | None = None,
    adapter_name: str = "default",
    *,
    overwrite: bool = False,
) -> ExportReport:
    """Write an adapter in the form that its reader needs; the model is only read.

    - `"peft"`: what `save_pretrained` writes, in one directory whatever the adapter's name.
    - `"serving"`: for vLLM, SGLang, TGI and others that know one rank and one scale: all layers
      padded with zeros to a rank that they accept, the scale folded into the factors
      (`lora_alpha == r`), no patterns. Layers without an adapter beside adapted ones of their kind
      get one that is zero.
    - `"merged"`: the base model with the adapter taken in, as transformers saves a model, in the
      base's dtype. Holds everything that PEFT can merge, DoRA and whole modules among it.

    The directory appears complete or not at all, and after an error is what it was.

    Args:
        peft_model: a model with a LoRA adapter, of this package or of PEFT.
        directory: where to write; new or empty, unless `overwrite`.
        target: the form.
        rank: truncate every layer to this rank, by the singular value decomposition of its
            product; for `"peft"` and `"serving"`. Default: exact.
        adapter_name: which adapter.
        overwrite: replace an earlier export, as a whole. A directory with other files is never
            replaced.

    Returns:
        Ranks and relative errors by layer, also in the `gradinit.json` that is written.

    Raises:
        ExportError: if the options, the adapter or the directory do not fit the target; the message
            says what to do instead.
        OutputError: if the disk is full, or the place cannot be written to.
    """
    config = _checked_config(peft_model, target, rank, adapter_name)
    with whole_folder(directory, overwrite=overwrite, is_ours=_is_ours) as part:
        state_dict = _saved_entries(peft_model, adapter_name, embeddings=target != "merged")
        if target == "merged":
            report = ExportReport(target, 0, ())
            merged_model(peft_model.get_base_model(), adapter_name).save_pretrained(part)
            new_card(part)
        elif target == "peft" and rank is None:
            report = _report(target, linear_layers(state_dict, _saved_config(config))[0])
            _save_as_peft(peft_model, part, adapter_name)
            return report
        else:
            plain, weights, report = _truncated(peft_model, config, state_dict, target, rank)
            save_file(weights, part / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
            plain.save_pretrained(str(part), auto_mapping_dict=_auto_mapping(peft_model, plain))
            peft_model.create_or_update_model_card(str(part))
        facts = {**facts_of(config), "export": report.to_dict()}
        write_json(part / FILE_NAME, {"format": EXPORT_FORMAT, **facts})
        saved(part)
    return report


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
    if rank is not None and (type(rank) is not int or rank < 1):
        raise ExportError(f"rank must be a positive integer or None, got {rank!r}.")
    if rank is not None and target == "merged":
        raise ExportError(
            f"target='merged' writes no factors that rank={rank} could truncate; leave rank out."
        )
    return cast("LoraConfig | SpectralConfig", config)


def _saved_entries(
    peft_model: PeftModel, adapter_name: str, *, embeddings: bool
) -> dict[str, Tensor]:
    """The adapter as plain LoRA, also where the config asks for the compact form."""
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


def _saved_config(config: LoraConfig | SpectralConfig) -> LoraConfig:
    if isinstance(config, GradInitConfig | SpectralConfig):
        return config.saved_config()
    return copy.deepcopy(config)


def _save_as_peft(peft_model: PeftModel, part: Path, adapter_name: str) -> None:
    peft_model.save_pretrained(str(part), selected_adapters=[adapter_name])
    if adapter_name == "default":
        return
    for path in (part / adapter_name).iterdir():
        path.replace(part / path.name)
    (part / adapter_name).rmdir()
    complete_card(part)


def _truncated(
    peft_model: PeftModel,
    config: LoraConfig | SpectralConfig,
    state_dict: Mapping[str, Tensor],
    target: ExportTarget,
    rank: int | None,
) -> tuple[LoraConfig, dict[str, Tensor], ExportReport]:
    saved = _saved_config(config)
    saved.inference_mode = True
    exact, others = linear_layers(state_dict, saved)
    if target == "serving":
        _check_base(saved)
        # PEFT copies the base weight of an adapted head into the file, which servers have already.
        copies = {f"{PREFIX}{name}.base_layer.weight" for name in exact}
        check_servable(saved, others.keys() - copies)
    elif rank is not None:
        _check_truncatable(saved, others)
    layers = {n: layer.truncated(rank) if rank else layer for n, layer in exact.items()}
    report = _report(target, exact, layers)
    model = peft_model.get_base_model()
    if target == "peft":
        _write_patterns(saved, layers)
        # No exclude_modules, which PEFT knows since 0.14.
        saved.target_modules = target_names(layers, model)
        saved.exclude_modules = saved.layers_to_transform = saved.layers_pattern = None
        return saved, {**others, **entries(layers)}, report
    served = served_rank(layers)
    uniform = {name: layer.folded().padded(served) for name, layer in layers.items()}
    uniform = completed(uniform, model)
    saved = LoraConfig(
        r=served,
        lora_alpha=served,
        target_modules=target_names(uniform, model),
        fan_in_fan_out=saved.fan_in_fan_out,
        task_type=saved.task_type,
        base_model_name_or_path=hub_id(_base_name(peft_model, saved)),
        revision=saved.revision,
        inference_mode=True,
    )
    added = tuple(ExportedLayer(name, 0, 0, 0.0) for name in uniform if name not in layers)
    report = dataclasses.replace(report, rank=served, layers=report.layers + added)
    return saved, entries(uniform), report


def _check_base(saved: LoraConfig) -> None:
    if saved.init_lora_weights not in _SAFE_STARTS:
        raise ExportError(
            f"an adapter with init_lora_weights={saved.init_lora_weights!r} has changed the base "
            "weights, and servers load the original ones; convert it as PEFT's documentation says, "
            "or use target='merged'."
        )


def _check_truncatable(saved: LoraConfig, others: Mapping[str, Tensor]) -> None:
    factors = sorted(key for key in others if ".lora_A" in key or ".lora_embedding_A" in key)
    if saved.target_parameters or factors:
        raise ExportError(
            "rank= truncates linear layers, and this adapter has others: "
            f"{saved.target_parameters or factors[:3]}; leave rank out."
        )


def _write_patterns(saved: LoraConfig, layers: Mapping[str, Layer]) -> None:
    """Say the ranks and scales of all layers, under their full names."""
    keys = {name: _pattern_key(name, layers) for name in layers}
    ranks = {keys[name]: layer.r for name, layer in layers.items()}
    root = 0.5 if saved.use_rslora else 1
    alphas = {keys[name]: x.scale * x.r**root for name, x in layers.items()}
    saved.r = max(ranks.values())
    saved.lora_alpha = next(alphas[key] for key, r in ranks.items() if r == saved.r)  # pyright: ignore[reportAttributeAccessIssue]
    saved.rank_pattern = {key: r for key, r in ranks.items() if r != saved.r}
    saved.alpha_pattern = {key: a for key, a in alphas.items() if a != saved.lora_alpha}


def _pattern_key(name: str, names: Iterable[str]) -> str:
    """A key of `rank_pattern` that matches one layer; versions of PEFT before 0.15 know no `^`."""
    ambiguous = any(other.endswith(f".{name}") for other in names)
    return f"^{re.escape(name)}" if ambiguous else name


def _report(
    target: ExportTarget, exact: Mapping[str, Layer], layers: Mapping[str, Layer] | None = None
) -> ExportReport:
    layers = exact if layers is None else layers
    lines = tuple(
        ExportedLayer(name, exact[name].r, layer.r, layer.relative_error)
        for name, layer in layers.items()
    )
    return ExportReport(target, max((line.exported_r for line in lines), default=0), lines)


def _base_name(peft_model: PeftModel, saved: LoraConfig) -> str | None:
    return saved.base_model_name_or_path or getattr(
        peft_model.get_base_model(), "name_or_path", None
    )


def _auto_mapping(peft_model: PeftModel, saved: LoraConfig) -> dict[str, str] | None:
    """What `AutoPeftModel` needs to find the base class, as `save_pretrained` writes it."""
    if saved.task_type is not None:
        return None
    base = type(peft_model.get_base_model())
    return {"base_model_class": base.__name__, "parent_library": base.__module__}


def _is_ours(name: str) -> bool:
    return name in _FILES or _WEIGHTS.fullmatch(name) is not None
