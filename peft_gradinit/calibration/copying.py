"""Copies of batches, for iterators that reuse their buffers and functions that change a batch."""

import copy
import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from accelerate.utils import recursively_apply, send_to_device
from torch import Tensor


def own_copy(batch: Any, device: torch.device | None = None) -> Any:
    """A batch with containers and tensors of its own, on a device; default: where they are.

    Dataclasses are containers. Other objects are copied if they have a `clone()`, moved if they have
    a `to()`, and else stay the same.
    """

    def copied(value: Any) -> Any:
        fields = fields_of(value)
        if fields is None:
            return _clone(value)
        value = copy.copy(value)
        for name, part in fields.items():  # also of a frozen one
            object.__setattr__(value, name, own_copy(part, device))
        return value

    if device is not None and fields_of(batch) is None:
        batch = send_to_device(batch, device)
    return recursively_apply(
        copied, batch, test_type=lambda v: hasattr(v, "clone") or fields_of(v) is not None
    )


def fields_of(value: Any) -> dict[str, Any] | None:
    """The fields of a dataclass that is no other container as well; `None` for other objects."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type | Mapping | Tensor):
        return None
    names = [field.name for field in dataclasses.fields(value)]
    return {name: getattr(value, name) for name in names if hasattr(value, name)}


def kept_sample(sample: Any) -> Any:
    """A plain dict with tensors, arrays and lists of its own; any other sample as it is."""
    if type(sample) is not dict:
        return sample
    return {key: _clone(value) for key, value in sample.items()}


def _clone(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.detach().clone().requires_grad_(value.requires_grad)
    if isinstance(value, Mapping):
        return value
    copies = (getattr(value, name, None) for name in ("clone", "copy"))
    copied = next((copied for copied in copies if callable(copied)), None)
    return value if copied is None else copied()
