"""The state that is kept with a pair: shapes of its entries, and whether a saved state has them."""

from collections.abc import Iterable, Mapping
from itertools import chain, product
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from ..errors import ConfigError
from .stacks import Layout, Slot, working_dtype


def zeros(slot: Slot, layout: Layout) -> Tensor:
    """An entry before the first step, in the working precision, sharded as its factor is."""
    factor = slot.A if layout == "A" else slot.B
    dtype = working_dtype(factor)
    if layout in ("A", "B"):
        return torch.zeros_like(factor, dtype=dtype)
    return torch.zeros(_shape(slot, layout), dtype=dtype, device=device_of(factor))


def device_of(factor: Any) -> torch.device:
    """Where the numbers of a factor are, or those of this process."""
    return factor.to_local().device if isinstance(factor, DTensor) else factor.device


def check_shapes(
    slots: Iterable[Slot],
    layouts: Mapping[str, Layout],
    groups: Iterable[Mapping[str, Any]],
    loaded: Mapping[str, Any],
) -> None:
    """Refuse a state of other ranks or layers, which would fail at the first step.

    Args:
        slots: the pairs that the optimiser holds.
        layouts: what it keeps with each.
        groups: all of its groups, whose parameters are numbered in their order.
        loaded: the saved state of an optimiser.

    Raises:
        ConfigError: naming the entry, and both shapes.
    """
    numbers = chain.from_iterable(group["params"] for group in loaded["param_groups"])
    held = chain.from_iterable(group["params"] for group in groups)
    states = {id(p): loaded["state"].get(i, {}) for i, p in zip(numbers, held, strict=False)}
    for slot, (name, layout) in product(slots, layouts.items()):
        entry, _, side = name.rpartition("_")
        factor = slot.A if side == "A" else slot.B
        value, want = states.get(id(factor), {}).get(entry), _shape(slot, layout)
        if isinstance(value, Tensor) and tuple(value.shape) != want:
            raise ConfigError(
                f"the state has {entry!r} of shape {tuple(value.shape)} for a factor {side} of shape "
                f"{tuple(factor.shape)}, whose own would have {want}: it is that of an adapter with other ranks "
                "or layers. Load that adapter first and make the optimiser of it, or begin without the state."
            )


def _shape(slot: Slot, layout: Layout) -> tuple[int, ...]:
    if layout in ("A", "B"):
        return tuple((slot.A if layout == "A" else slot.B).shape)
    n, r = slot.n_experts, slot.A.shape[0] // slot.n_experts
    return (n, r, r) if layout == "square" else (n, slot.B.shape[0], slot.A.shape[1])
