"""The first batches of a pass, kept to measure the loss on them again."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .copying import fields_of

MAX_BYTES = 64 * 2**20
"""Limit on the batches kept: millions of token ids, or a hundred images."""


@dataclasses.dataclass
class Replay:
    """The first batches of a pass, and the base model's loss on them.

    Attributes:
        batches: as passed to the model.
        loss_sum: sum of their losses, each times its weight.
        weights: for each batch, the number of terms that its loss is the mean of.
        n_bytes: memory of the batches.
        custom_loss: whether the loss was the user's `loss_fn`, not the model's own.
        of_one_process: whether other processes have batches of the same pass.
    """

    batches: list[Any] = dataclasses.field(default_factory=list, repr=False)
    loss_sum: float = 0.0
    weights: list[float] = dataclasses.field(default_factory=list, repr=False)
    n_bytes: int = 0
    custom_loss: bool = False
    of_one_process: bool = False

    def keep(self, batch: Any, loss: float, weight: float) -> None:
        """Keep a batch until the limit is reached; a batch of weight 0 only if it is the first."""
        n_bytes = _n_bytes(batch)
        if self.batches and (self.n_bytes + n_bytes > MAX_BYTES or weight == 0):
            return
        self.batches.append(batch)
        self.n_bytes += n_bytes
        self.loss_sum += loss * weight
        self.weights.append(weight)

    @property
    def is_storable(self) -> bool:
        """Whether all batches are dicts of tensors, which a file can hold."""
        return all(
            isinstance(batch, Mapping) and all(isinstance(v, Tensor) for v in batch.values())
            for batch in self.batches
        )

    def restore(self, batches: list[Any], facts: Mapping[str, Any]) -> None:
        """Continue with the batches of an earlier process, and its `facts()`."""
        self.batches = batches
        for name, value in facts.items():
            setattr(self, name, value)

    def facts(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        return {
            "loss_sum": self.loss_sum,
            "weights": self.weights,
            "n_bytes": self.n_bytes,
            "custom_loss": self.custom_loss,
        }


def _n_bytes(batch: Any) -> int:
    """Memory of a batch; that of an object whose tensors cannot be seen is taken for the limit."""
    if isinstance(batch, Tensor):
        return batch.numel() * batch.element_size()
    fields = fields_of(batch)
    parts = batch if fields is None else fields
    if isinstance(parts, Mapping):
        parts = list(parts.values())
    if isinstance(parts, tuple | list):
        return sum(map(_n_bytes, parts))
    return MAX_BYTES if hasattr(parts, "to") or hasattr(parts, "clone") else 0
