"""A saved LoRA adapter as factors by layer: read, checked, and written as plain LoRA."""

import copy
import dataclasses
import math
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import get_pattern_key
from peft.utils.save_and_load import load_peft_weights
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from ..errors import AdapterError
from ..files import whole_folder
from ..linalg import Factors

PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"

_FILES = ("adapter_config.json", SAFETENSORS_WEIGHTS_NAME, "README.md", "gradinit.json")

OVERWRITES_BASE = ("pissa", "olora", "corda", "lora_ga")
"""Starts of PEFT that write `W - s B0 A0` into the base: the file alone is no update of it."""


@dataclasses.dataclass(frozen=True)
class SavedAdapter:
    """A LoRA adapter on disk.

    Attributes:
        directory: folder or Hub name.
        config: its `adapter_config.json`.
        layers: updates by module name in the base model, scaling included, float32.
        others: tensors of the file that are no LoRA factor of a linear layer (embeddings,
            convolutions, experts, biases, modules trained in full), by key.
    """

    directory: str
    config: LoraConfig
    layers: Mapping[str, Factors]
    others: Mapping[str, Tensor]

    @property
    def overwritten_by(self) -> str | None:
        """The start that wrote into the base model; `None` for adapters of an untouched base."""
        start = self.config.init_lora_weights
        if isinstance(start, str) and start.startswith(OVERWRITES_BASE):
            return start
        return None

    def scaling(self, name: str) -> float:
        """What the product of the saved factors of a layer is multiplied with."""
        return _scaling(self.config, name, self.layers[name].r)

    def check_untouched_base(self) -> None:
        """Refuse an adapter that is an update of another weight than the base model's.

        Raises:
            AdapterError: if its start wrote into the base.
        """
        if self.overwritten_by:
            raise AdapterError(
                f"{self.directory!r} was started with init_lora_weights={self.overwritten_by!r}, "
                "which writes into the base model, so the file is not an update of the original "
                "weights; turn it into one with `peft-gradinit convert` first."
            )

    def check_all_linear(self) -> None:
        """Refuse an adapter of which more than the linear layers depends on rank and scaling.

        Raises:
            AdapterError: naming the first such tensor.
        """
        scaled = sorted(key for key in self.others if ".lora_" in key)
        if scaled:
            raise AdapterError(
                f"{self.directory!r} adapts more than linear layers: {len(scaled)} tensors such as "
                f"{scaled[0]} cannot be written at another rank and scaling; merge it into its base "
                "model instead (`peft-gradinit export --target merged`)."
            )


def read_adapter(directory: str | os.PathLike[str]) -> SavedAdapter:
    """Read a LoRA adapter from a folder or, by name, from the Hub.

    Args:
        directory: what `save_pretrained` wrote.

    Returns:
        The adapter; nothing is left out.

    Raises:
        AdapterError: if there is none, it is damaged, or it is not a LoRA whose update is `s B A`.
    """
    name = str(directory)
    config = _read_config(name)
    if config.use_dora:
        raise AdapterError(
            f"{name!r} is a DoRA adapter, whose update is not a product of two factors; merge it "
            "into its base model instead."
        )
    try:
        tensors = load_peft_weights(name, device="cpu")
    except (OSError, ValueError, SafetensorError, RuntimeError) as error:
        raise AdapterError(f"cannot read the weights of {name!r}: {error}") from error
    layers, others = {}, dict(tensors)
    for key in [k for k in tensors if k.endswith(_A) and tensors[k].dim() == 2]:
        stem = key.removesuffix(_A)
        layer = stem.removeprefix(PREFIX)
        if _is_of_parameter(layer, config):
            continue
        A, B = others.pop(key), others.pop(stem + _B, None)
        layers[layer] = _factors(name, layer, A, B, config)
    if not layers:
        raise AdapterError(
            f"{name!r} holds no LoRA factors of linear layers ({len(others)} other tensors); give "
            "an adapter that adapts some."
        )
    return SavedAdapter(name, config, layers, others)


def write_adapter(
    directory: str | os.PathLike[str],
    like: SavedAdapter,
    layers: Mapping[str, Factors],
    *,
    overwrite: bool = False,
) -> Path:
    """Write updates as a plain LoRA adapter of scaling 1.

    `lora_alpha` equals `r` and `use_rslora` is off, in every layer, so that readers which ignore
    `alpha_pattern` compute the same. Layers of other ranks than the largest are in `rank_pattern`.

    Args:
        directory: made as a whole or not at all.
        like: gives targets, task, base model and whatever else the file holds.
        layers: updates by the names of `like.layers`.
        overwrite: replace a folder that is there.

    Returns:
        The folder.
    """
    like.check_all_linear()
    with whole_folder(directory, overwrite=overwrite, is_ours=_FILES.__contains__) as folder:
        tensors = dict(like.others)
        for name, update in layers.items():
            tensors[f"{PREFIX}{name}{_A}"] = update.A
            tensors[f"{PREFIX}{name}{_B}"] = update.B
        _plain_config(like.config, layers).save_pretrained(str(folder))
        contiguous = {key: tensor.contiguous().clone() for key, tensor in tensors.items()}
        save_file(contiguous, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    return Path(directory)


def _plain_config(config: LoraConfig, layers: Mapping[str, Factors]) -> LoraConfig:
    plain = copy.deepcopy(config)
    r = max(update.r for update in layers.values())
    plain.r, plain.lora_alpha = r, r
    plain.use_rslora, plain.init_lora_weights, plain.inference_mode = False, True, True
    ranks = {f"^{re.escape(n)}": u.r for n, u in layers.items() if u.r != r}
    plain.rank_pattern, plain.alpha_pattern = cast("dict[str, Any]", ranks), dict(ranks)
    for name in ("lora_ga_config", "corda_config", "eva_config"):
        if hasattr(plain, name):
            setattr(plain, name, None)
    return plain


def _read_config(name: str) -> LoraConfig:
    if not Path(name).exists() and (name.startswith((".", "/")) or name.count("/") != 1):
        raise AdapterError(f"there is no adapter at {name!r}; give the folder of a saved adapter.")
    try:
        config = PeftConfig.from_pretrained(name)
    except (OSError, ValueError, KeyError, TypeError) as error:
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
    return config


def _factors(name: str, layer: str, A: Tensor, B: Tensor | None, config: LoraConfig) -> Factors:
    if B is None or B.dim() != 2 or B.shape[1] != A.shape[0]:
        got = None if B is None else tuple(B.shape)
        raise AdapterError(
            f"{name!r} is damaged: {layer} has lora_A of shape {tuple(A.shape)} and lora_B of shape "
            f"{got}; restore the saved adapter."
        )
    want = _pattern(config.rank_pattern, layer, config.r)
    if A.shape[0] != want:
        raise AdapterError(
            f"{name!r} is damaged: {layer} has rank {A.shape[0]} in the weights and {want} in "
            "adapter_config.json; restore the saved adapter."
        )
    return Factors(A.float(), B.float() * _scaling(config, layer, A.shape[0]))


def _is_of_parameter(layer: str, config: LoraConfig) -> bool:
    """Whether factors are of `target_parameters`, those of all experts in one pair of matrices."""
    holder = layer.replace(".base_layer", "")  # one wrapper for each parameter of a module
    of_parameters = (name.rpartition(".")[0] for name in config.target_parameters or ())
    return any(holder == of or holder.endswith(f".{of}") for of in of_parameters)


def _scaling(config: LoraConfig, layer: str, r: int) -> float:
    alpha = _pattern(config.alpha_pattern, layer, config.lora_alpha)
    return alpha / (math.sqrt(r) if config.use_rslora else r)


def _pattern(patterns: Mapping[str, Any] | None, layer: str, default: Any) -> Any:
    patterns = patterns or {}
    return patterns.get(get_pattern_key(list(patterns), layer), default)


def same_layers(first: SavedAdapter, second: SavedAdapter) -> list[str]:
    """Names of the layers that both adapt.

    Args:
        first: an adapter.
        second: another one.

    Returns:
        Names in the order of `first`.

    Raises:
        AdapterError: if they have none in common, or disagree about a layer's shape.
    """
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
