r"""The anchored pair: a start whose own product is taken out of the function.

LoRA-GA starts at `B0 A0 != 0` and needs `W x` unchanged. Instead of writing `W - s B0 A0` into the
base, `lora_A.weight` becomes `[A; A0]`, `(2r, in)`, and `lora_B.weight` becomes `[B, -B0]`,
`(out, 2r)`, through `torch.nn.utils.parametrize`: `A` and `B` are the trainable parameters, `A0`
and `-B0` are buffers. PEFT's forward, merging, `get_delta_weight` and quantised layers all see an
ordinary LoRA of rank `2r` that computes `s (B A - B0 A0) x`, and the saved file is that LoRA.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..calibration import assign
from ..errors import ShapeError
from .parameters import n_experts

ORIGINAL = "parametrizations.weight.original"
ANCHOR = "parametrizations.weight.0.anchor"


class Anchor(nn.Module):
    """Appends a constant block to a weight.

    Attributes:
        anchor: `A0` (`-B0`), of the shape of the trainable weight, float32.
        dim: 0 for `lora_A`, 1 for `lora_B`.
        n: of the experts that the weight is for; 1 for layers.
    """

    anchor: Tensor

    def __init__(self, anchor: Tensor, dim: int, n: int = 1) -> None:
        super().__init__()
        self.register_buffer("anchor", anchor)
        self.dim = dim
        self.n = n

    def forward(self, trainable: Tensor) -> Tensor:
        """Concatenate; the anchor takes the trainable weight's dtype, so that both round alike.

        Args:
            trainable: `A`, `(n r, in)`, or `B`, `(out, r n)`.

        Returns:
            `[A; A0]`, `(n 2r, in)`, or `[B, -B0]`, `(out, 2r n)`.
        """
        return _side_by_side(trainable, self.anchor.to(trainable), self.dim, self.n)


def anchor_layer(layer: LoraLayer, adapter_name: str) -> None:
    """Give an injected LoRA layer an empty anchor."""
    for linear, dim in _sides(layer, adapter_name):
        empty = torch.zeros_like(linear.weight, dtype=torch.float32)
        anchor = Anchor(empty, dim, n_experts(layer))
        parametrize.register_parametrization(linear, "weight", anchor, unsafe=True)


def fill_anchored(layer: LoraLayer, adapter_name: str, A0: Tensor, B0: Tensor) -> None:
    """Set both the trainable factors and the anchor to the start.

    Args:
        layer: a layer that `anchor_layer` has prepared.
        adapter_name: which adapter.
        A0: `(r, in)`; of a parameter in PEFT's layout, as `parameters.stacked` gives it.
        B0: `(out, r)`, likewise.
    """
    for (linear, _), start, anchor in zip(
        _sides(layer, adapter_name), (A0, B0), (A0, -B0), strict=True
    ):
        original = linear.parametrizations.weight.original
        assign(original, start)
        assign(anchor_of(linear).anchor, anchor)


def fill_plain(layer: LoraLayer, adapter_name: str, A0: Tensor, B0: Tensor) -> None:
    """Set the factors of a layer without an anchor; arguments as for `fill_anchored`."""
    for (linear, _), start in zip(_sides(layer, adapter_name), (A0, B0), strict=True):
        assign(linear.weight, start)


def plain_factors(layer: LoraLayer, adapter_name: str) -> tuple[Tensor, Tensor]:
    """The trainable `A` and `B` of a layer, with or without an anchor beside them."""
    A, B = (
        linear.parametrizations.weight.original
        if parametrize.is_parametrized(linear, "weight")
        else linear.weight
        for linear, _ in _sides(layer, adapter_name)
    )
    return A, B


def is_anchored(layer: nn.Module, adapter_name: str) -> bool:
    """Whether this adapter of this layer is an anchored pair."""
    if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
        return False
    return parametrize.is_parametrized(layer.lora_A[adapter_name], "weight")


def anchor_of(linear: nn.Module) -> Anchor:
    """The `Anchor` of a parametrized `lora_A` or `lora_B`."""
    return linear.parametrizations.weight[0]  # pyright: ignore[reportReturnType, reportIndexIssue, reportAttributeAccessIssue]


def join(state_dict: dict[str, Tensor], experts: Mapping[str, int]) -> dict[str, Tensor]:
    """Turn live entries into those of a plain LoRA of rank `2r`.

    Anchored entries are concatenated; other LoRA factors of the adapter (embeddings, convolutions)
    are padded with zeros, so that the whole file has one rank.

    Args:
        state_dict: entries of one adapter, with or without its name in the keys.
        experts: number of experts of each anchored layer, by layer name as in the keys.

    Returns:
        A new dict.
    """
    joined = {}
    for key, tensor in state_dict.items():
        dim = _factor_dim(key)
        if key.endswith(ANCHOR):
            continue
        if key.endswith(ORIGINAL) and dim is not None:
            stem = key.removesuffix(ORIGINAL)
            anchor, n = state_dict[stem + ANCHOR].to(tensor), experts[_layer_of(key)]
            joined[f"{stem}weight"] = _side_by_side(tensor, anchor, dim, n)
        elif dim is not None and tensor.dim() > 1:
            joined[key] = torch.cat([tensor, torch.zeros_like(tensor)], dim=dim)
        else:
            joined[key] = tensor
    return joined


def split(
    state_dict: dict[str, Tensor], anchored: Mapping[str, tuple[int, int]]
) -> dict[str, Tensor]:
    """Undo `join`.

    Args:
        state_dict: entries of a plain LoRA of rank `2r`, without adapter names.
        anchored: live rank `r` and number of experts of each anchored layer, by layer name as in the
            keys.

    Returns:
        A new dict.

    Raises:
        ShapeError: if a factor does not have twice the live rank.
    """
    parts = {}
    for key, tensor in state_dict.items():
        dim = _factor_dim(key)
        if dim is None or tensor.dim() < 2:
            parts[key] = tensor
            continue
        layer = _layer_of(key)
        r, n = anchored.get(layer, (tensor.shape[dim] // 2, 1))
        if tensor.shape[dim] != 2 * r * n:
            raise ShapeError(
                f"{key} has rank {tensor.shape[dim] / n:g}, but the live adapter has r={r} and loads "
                f"files of rank {2 * r}; load an adapter that this method saved, with the same r, or "
                "load this one with PeftModel.from_pretrained."
            )
        first, second = _apart(tensor, dim, n)
        if layer in anchored:
            stem = key.removesuffix("weight")
            parts[stem + ORIGINAL], parts[stem + ANCHOR] = first.contiguous(), second.contiguous()
        else:
            parts[key] = first.contiguous()
    return parts


def _side_by_side(first: Tensor, second: Tensor, dim: int, n: int) -> Tensor:
    """Concatenate factors along their rank; `lora_A` of `n` experts does so within each."""
    if dim == 1:  # the experts of one rank stand side by side
        return torch.cat([first, second], dim=1)
    blocks = [t.unflatten(0, (n, -1)) for t in (first, second)]
    return torch.cat(blocks, dim=1).flatten(0, 1)


def _apart(joined: Tensor, dim: int, n: int) -> tuple[Tensor, Tensor]:
    """Undo `_side_by_side`."""
    if dim == 1:
        first, second = joined.chunk(2, dim=1)
        return first, second
    first, second = joined.unflatten(0, (n, -1)).chunk(2, dim=1)
    return first.flatten(0, 1), second.flatten(0, 1)


def _layer_of(key: str) -> str:
    return key[: key.rindex(".lora_")]


def _factor_dim(key: str) -> int | None:
    """Which dimension of an entry is the rank; `None` for entries that are no factor."""
    _, dot, tail = key.rpartition(".lora_")
    if not dot or tail.endswith("bias"):
        return None
    side = tail.split(".")[0]
    return {"A": 0, "embedding_A": 0, "B": 1, "embedding_B": 1}.get(side)


def _sides(layer: LoraLayer, adapter_name: str) -> list[tuple[Any, int]]:
    return [(layer.lora_A[adapter_name], 0), (layer.lora_B[adapter_name], 1)]
