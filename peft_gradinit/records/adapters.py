"""Saved LoRA adapters: reading and checking them, and writing them as plain LoRA."""

import dataclasses
import math
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import AdapterError, DataError
from ..files import check_is_file, check_replaceable, check_writable, whole_folder
from ..linalg import Factors
from ..numbers import is_finite_number, is_integer
from .digests import check_digests, check_finite
from .hub import adapter_folder
from .lora_file import (
    OUT_OF_ATTENTION,
    alpha_of,
    entries,
    linear_layers,
    name_in_file,
    overwrites_base,
    scaling,
    unscaled,
)
from .names import CARD, PICTURE, PROVENANCE_FILE
from .reading import read_dict

_FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, CARD, PICTURE, PROVENANCE_FILE)


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """A LoRA adapter on disk.

    Attributes:
        directory: folder or Hub name.
        config: its `adapter_config.json`.
        layers: updates by module name in the base model, scaling included, float32.
        others: all other tensors of the file by key (embeddings, convolutions, experts, biases,
            modules trained in full).
        facts: its `gradinit.json`, such as names of classes and the padding token; empty without one.
    """

    directory: str
    config: LoraConfig
    layers: Mapping[str, Factors]
    others: Mapping[str, Tensor]
    facts: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    @property
    def overwritten_by(self) -> str | None:
        """The start that wrote into the base model; `None` for adapters of an untouched base."""
        start = self.config.init_lora_weights
        return start if isinstance(start, str) and overwrites_base(self.config) else None

    def scaling(self, name: str) -> float:
        """The factor of the product `B A` of a layer's saved factors."""
        alpha, r = alpha_of(self.config, name), self.layers[name].r
        return scaling(alpha, r, use_rslora=self.config.use_rslora)

    def check_untouched_base(self) -> None:
        """Refuse an adapter whose start wrote into the base weights."""
        if self.overwritten_by:
            raise AdapterError(
                f"{self.directory!r} was started with init_lora_weights={self.overwritten_by!r}, "
                "which writes into the base model, so the file is not an update of the original "
                "weights; turn it into one with `peft-gradinit convert` first."
            )

    def check_all_linear(self) -> None:
        """Refuse an adapter with LoRA factors of other layers than linear ones."""
        scaled = sorted(key for key in self.others if ".lora_" in key)
        if scaled:
            raise AdapterError(
                f"{self.directory!r} adapts more than linear layers: {len(scaled)} tensors such as "
                f"{scaled[0]} cannot be written at another rank and scaling; merge it into its "
                "base model instead (`peft-gradinit export --target merged`)."
            )


def read_adapter(directory: str | os.PathLike[str], *, for_merging: bool = False) -> SavedAdapter:
    """Read a LoRA adapter with all its tensors from a folder or, by name, from the Hub.

    Args:
        directory: folder or Hub name.
        for_merging: take any adapter that PEFT can merge into its base or write again: DoRA, whose
            update is not `s B A`, and adapters without linear layers.

    Raises:
        AdapterError: if there is none, it is damaged, its files are of different saves, or, unless
            `for_merging`, its update is not `s B A` of linear layers. KaSA is refused always.
    """
    name = str(directory)
    folder = _folder(name)
    config = _read_config(name, folder)
    _check_kind(name, config, for_merging=for_merging)
    try:
        for file in (SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME):
            check_is_file(folder / file)
        tensors = load_peft_weights(str(folder), device="cpu")
    except (OSError, ValueError, SafetensorError, RuntimeError, UnpicklingError) as error:
        raise AdapterError(f"cannot read the weights of {name!r}: {error}") from error
    facts = _facts_of_save(folder, tensors)
    try:
        layers, others = linear_layers(tensors, config)
    except (AttributeError, TypeError, ValueError) as error:
        raise AdapterError(f"{name!r} is damaged: {error}; restore the saved adapter.") from error
    if not layers and not for_merging:
        raise AdapterError(
            f"{name!r} holds no LoRA factors of linear layers ({len(others)} other tensors); give "
            "an adapter that adapts some."
        )
    return SavedAdapter(name, config, layers, others, facts)


def _check_kind(name: str, config: LoraConfig, *, for_merging: bool) -> None:
    """Refuse an adapter whose update of the original weights is not `s B A`."""
    if config.use_dora and not for_merging:
        raise AdapterError(
            f"{name!r} is a DoRA adapter, whose update is not a product of two factors; merge it "
            "into its base model instead (`peft-gradinit export --target merged`)."
        )
    if getattr(config, "kasa_config", None):
        raise AdapterError(
            f"{name!r} is a KaSA adapter, whose start has changed the base weights; merge it with "
            "PEFT's merge_and_unload() instead."
        )


def _facts_of_save(folder: Path, tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The `gradinit.json` beside weights; `AdapterError` if it describes another save."""
    facts = read_dict(folder / PROVENANCE_FILE) if (folder / PROVENANCE_FILE).exists() else {}
    if facts:
        check_digests(folder, facts, tensors)
    check_finite(folder, tensors)
    return facts


def check_place(directory: str | os.PathLike[str], *, overwrite: bool) -> None:
    """Refuse a directory that `write_adapter` would refuse, before there is anything to write."""
    check_replaceable(Path(directory), overwrite, _FILES.__contains__)
    check_writable(Path(directory).parent)


def write_adapter(
    directory: str | os.PathLike[str],
    like: SavedAdapter,
    layers: Mapping[str, Factors],
    *,
    overwrite: bool = False,
) -> Path:
    """Write updates, by the names of `like.layers`, as a plain LoRA adapter of scaling 1.

    Targets, task, base model and all other tensors are those of `like`. The folder is written whole
    or not at all.
    """
    like.check_all_linear()
    layers = _of_attention_alike(layers)
    with whole_folder(directory, overwrite=overwrite, is_ours=_FILES.__contains__) as folder:
        ranks = {name: update.r for name, update in layers.items()}
        unscaled(like.config, ranks, inference_mode=True).save_pretrained(str(folder))
        others = {
            name_in_file(key, prefixed=True): tensor.contiguous().clone()
            for key, tensor in like.others.items()
        }
        tensors = {**others, **entries(layers)}
        save_file(tensors, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return Path(directory)


def _of_attention_alike(layers: Mapping[str, Factors]) -> dict[str, Factors]:
    """The same updates, with one rank for both layers of a `MultiheadAttention`, as PEFT has it."""
    ranks: dict[str, int] = {}
    for name, update in layers.items():
        module = name.removesuffix(OUT_OF_ATTENTION)
        ranks[module] = max(update.r, ranks.get(module, 0))
    wanted = {name: ranks[name.removesuffix(OUT_OF_ATTENTION)] for name in layers}
    return {n: u if u.r == wanted[n] else u.padded(wanted[n]) for n, u in layers.items()}


def _folder(name: str) -> Path:
    """The folder of an adapter, or the copy in the cache of one on the Hub."""
    if not Path(name).exists() and (name.startswith((".", "/")) or name.count("/") != 1):
        raise AdapterError(f"there is no adapter at {name!r}; give the folder of a saved adapter.")
    try:
        return adapter_folder(name)
    except DataError as error:
        raise AdapterError(str(error)) from error


def _read_config(name: str, folder: Path) -> LoraConfig:
    named = [] if (folder / CONFIG_NAME).exists() else sorted(folder.glob(f"*/{CONFIG_NAME}"))
    if named:
        inside = ", ".join(str(Path(name) / path.parent.name) for path in named)
        raise AdapterError(
            f"{name!r} is no adapter but holds some in folders of their own, as the output of a recipe does and "
            f"PEFT's of adapters that are not named 'default'; give one of {inside}."
        )
    try:
        check_is_file(folder / CONFIG_NAME)
        config = PeftConfig.from_pretrained(str(folder))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise AdapterError(
            f"{name!r} holds no readable adapter_config.json: {error}; give the folder of a saved "
            "PEFT adapter."
        ) from error
    kind = getattr(config.peft_type, "value", config.peft_type)
    if not isinstance(config, LoraConfig) or kind != "LORA":
        raise AdapterError(
            f"{name!r} is a {kind} adapter where plain LoRA is expected; for an adapter of this "
            "package in its compact form, save it with save_format='lora'."
        )
    _check_options(name, config)
    return config


def _check_options(name: str, config: LoraConfig) -> None:
    """Refuse options from which no scaling can be computed."""
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    if isinstance(ranks, dict) and isinstance(alphas, dict):
        whole = all(is_integer(r) and r > 0 for r in (config.r, *ranks.values()))
        if whole and all(map(is_finite_number, (config.lora_alpha, *alphas.values()))):
            return
    raise AdapterError(
        f"the adapter_config.json of {name!r} is damaged: ranks must be positive integers and "
        f"alphas numbers, got r={config.r!r}, lora_alpha={config.lora_alpha!r}, "
        f"rank_pattern={config.rank_pattern!r}, alpha_pattern={config.alpha_pattern!r}; restore "
        "the saved adapter."
    )


def same_layers(first: SavedAdapter, second: SavedAdapter) -> list[str]:
    """Names of the layers in both adapters, which must agree about their shapes."""
    names = [name for name in first.layers if name in second.layers]
    if not names:
        raise AdapterError(
            f"{first.directory!r} and {second.directory!r} have no layer in common: "
            f"{next(iter(first.layers))}, … and {next(iter(second.layers))}, …; give adapters of "
            "one base model."
        )
    for name in names:
        one, other = (_shape(a.layers[name]) for a in (first, second))
        if one != other:
            raise AdapterError(
                f"{name} is {one} in {first.directory!r} and {other} in {second.directory!r}; give "
                "adapters of one base model."
            )
    return names


def _shape(update: Factors) -> tuple[int, int]:
    return update.B.shape[0], update.A.shape[1]


def relative_norm(update: Factors, weight: Tensor) -> float:
    """`|dW|_F / |W|_F`; infinite for a zero weight."""
    norm = torch.linalg.matrix_norm(weight.float()).item()
    size = torch.linalg.vector_norm(update.svd().S).item()
    return size / norm if norm else math.inf
