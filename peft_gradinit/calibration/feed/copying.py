"""Copies of batches, for iterators that reuse their buffers and functions that change a batch."""

from collections.abc import Mapping
from typing import Any

from accelerate.utils import recursively_apply
from torch import Tensor


def own_copy(batch: Any) -> Any:
    """A batch with containers and tensors of its own.

    Other objects are copied if they have a `clone()`, and else stay the same.
    """
    return recursively_apply(_clone, batch, test_type=lambda v: hasattr(v, "clone"))


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
