"""Saving and loading: entries of a live, possibly anchored adapter from and to plain LoRA."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError, NotInitializedError, ShapeError
from ...layouts import plain_name
from ...records import is_prefixed, name_in_file
from .anchored import is_anchored, side_by_side
from .deferred import is_deferred
from .pairs import adapted_layers, n_experts, pairs

ORIGINAL = "parametrizations.weight.original"
ANCHOR = "parametrizations.weight.0.anchor"


def check_savable(model: nn.Module, adapter_name: str) -> None:
    """Refuse to save an adapter without a start, or with factors of another rank than its layers.

    Raises:
        NotInitializedError: if it has no start yet.
        ConfigError: if its factors were widened, as preparing for compiled hot-swapping does.
    """
    check_started(model, [adapter_name], "save")
    for pair in pairs(model, adapter_name):
        rank = pair.A.shape[0] / pair.n_experts
        if pair.A.dim() == 2 and rank != pair.r:
            raise ConfigError(
                f"{pair.name} has factors of rank {rank:g}, but the adapter {adapter_name!r} has "
                f"r={pair.r} there: the model was changed, as prepare_model_for_compiled_hotswap "
                "does. Save before that, and prepare the adapter that PeftModel.from_pretrained "
                "loads."
            )


def check_started(model: nn.Module, adapter_names: Iterable[str], action: str) -> None:
    """Refuse what cannot be done with adapters that have no start yet.

    Args:
        model: with the adapters.
        adapter_names: which of them.
        action: what there is nothing to do with, such as "save".

    Raises:
        NotInitializedError: naming an adapter and a layer without a start.
    """
    for adapter_name in adapter_names:
        layers = adapted_layers(model, adapter_name)
        deferred = [name for name, layer in layers if is_deferred(layer, adapter_name)]
        if deferred:
            raise NotInitializedError(
                f"adapter {adapter_name!r} is deferred and {len(deferred)} layers ({deferred[0]}, …) "
                f"have no start yet, so there is nothing to {action}; call initialize(model, data), or "
                "train with a CalibrationCallback."
            )


def plain_entries(
    model: nn.Module, adapter_name: str, entries: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The entries of an anchored adapter as those of a plain LoRA of rank `2r`."""
    prefixed = is_prefixed(entries)
    anchored = _anchored(model, adapter_name, prefixed=prefixed)
    whole = entries | _anchors_left_out(model, entries, prefixed=prefixed)
    return join(whole, {name: n for name, (_, n) in anchored.items()})


def _anchors_left_out(
    model: nn.Module, entries: Mapping[str, Tensor], *, prefixed: bool
) -> dict[str, Tensor]:
    """The live anchors of factors that are there without, as in entries of parameters alone."""
    anchors = [key.removesuffix(ORIGINAL) + ANCHOR for key in entries if key.endswith(ORIGINAL)]
    missing = {plain_name(key): key for key in anchors if key not in entries}
    buffers = (
        (name_in_file(plain_name(name), prefixed=prefixed), buffer)
        for name, buffer in model.named_buffers()
    )
    return {missing[name]: buffer for name, buffer in buffers if name in missing}


def live_entries(
    model: nn.Module, adapter_name: str, entries: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Undo `plain_entries`."""
    return split(entries, _anchored(model, adapter_name, prefixed=is_prefixed(entries)))


def _anchored(model: nn.Module, adapter_name: str, *, prefixed: bool) -> dict[str, tuple[int, int]]:
    """Rank and number of experts of each anchored layer, by its name in a file."""
    layers: dict[str, Any] = {
        n: m for n, m in model.named_modules() if is_anchored(m, adapter_name)
    }
    return {
        name_in_file(plain_name(name), prefixed=prefixed): (layer.r[adapter_name], n_experts(layer))
        for name, layer in layers.items()
    }


def join(state_dict: dict[str, Tensor], experts: Mapping[str, int]) -> dict[str, Tensor]:
    """Turn live entries into those of a plain LoRA of rank `2r`.

    Anchored entries are concatenated. Other LoRA factors (embeddings, convolutions) are padded with
    zeros, so that the whole file has one rank. `experts` has the number of experts of each anchored
    layer, by its name in the keys.
    """
    joined = {}
    for key, tensor in state_dict.items():
        dim = _factor_dim(key)
        if key.endswith(ANCHOR):
            continue
        if key.endswith(ORIGINAL) and dim is not None:
            stem = key.removesuffix(ORIGINAL)
            anchor, n = state_dict[stem + ANCHOR].to(tensor), experts[plain_name(_layer_of(key))]
            joined[f"{stem}weight"] = side_by_side(tensor, anchor, dim, n)
        elif dim is not None and tensor.dim() > 1:
            groups = _groups(state_dict, key)
            joined[key] = side_by_side(tensor, torch.zeros_like(tensor), dim, groups)
        else:
            joined[key] = tensor
    return joined


def split(
    state_dict: dict[str, Tensor], anchored: Mapping[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """Undo `join`, with the live rank and number of experts of each anchored layer."""
    parts = {}
    for key, tensor in state_dict.items():
        dim = _factor_dim(key)
        if dim is None or tensor.dim() < 2:
            parts[key] = tensor
            continue
        layer = _layer_of(key)
        n = _groups(state_dict, key)
        r, n = anchored.get(plain_name(layer), (tensor.shape[dim] // (2 * n), n))
        if tensor.shape[dim] != 2 * r * n:
            raise ShapeError(
                f"{key} has rank {tensor.shape[dim] / n:g}, but the live adapter has r={r} and "
                f"loads files of rank {2 * r}; load an adapter that this method saved, with the "
                "same r, or load this one with PeftModel.from_pretrained."
            )
        first, second = _halves(tensor, dim, n)
        if plain_name(layer) in anchored:
            stem = key.removesuffix("weight")
            parts[stem + ORIGINAL], parts[stem + ANCHOR] = first.contiguous(), second.contiguous()
        else:
            parts[key] = first.contiguous()
    return parts


def _halves(joined: Tensor, dim: int, n: int) -> tuple[Tensor, Tensor]:
    """Undo `side_by_side`."""
    if dim == 1:
        first, second = joined.chunk(2, dim=1)
        return first, second
    first, second = joined.unflatten(0, (n, -1)).chunk(2, dim=1)
    return first.flatten(0, 1), second.flatten(0, 1)


def _groups(state_dict: Mapping[str, Tensor], key: str) -> int:
    """Groups of a convolution, of which each has its part of the rank; 1 for other layers."""
    stem, _, tail = key.rpartition(".lora_A")
    A, B = state_dict[key], state_dict.get(f"{stem}.lora_B{tail}")
    return A.shape[0] // B.shape[1] if stem and B is not None and A.dim() > 2 else 1


def _layer_of(key: str) -> str:
    return key[: key.rindex(".lora_")]


def _factor_dim(key: str) -> int | None:
    """The dimension of the rank in an entry; `None` for entries that are no factor."""
    _, dot, tail = key.rpartition(".lora_")
    if not dot or tail.endswith("bias"):
        return None
    side = tail.split(".")[0]
    return {"A": 0, "embedding_A": 0, "B": 1, "embedding_B": 1}.get(side)
