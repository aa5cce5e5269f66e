"""Batches of a pass, kept to measure the loss on them again."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .guards import left_as_found
from .run import loss_and_weight
from .spec import Calibration

MAX_BYTES = 64 * 2**20
"""What is kept at most: millions of token ids, or a hundred images."""


@dataclasses.dataclass
class Replay:
    """The first batches of a pass, and the base model's loss on them.

    Attributes:
        batches: on the model's device.
        loss_sum: sum of their losses, each times its weight.
        weight: sum of their weights.
        n_bytes: what the batches hold.
    """

    batches: list[Any] = dataclasses.field(default_factory=list, repr=False)
    loss_sum: float = 0.0
    weight: float = 0.0
    n_bytes: int = 0

    @property
    def loss(self) -> float:
        """Mean loss of the base model."""
        return self.loss_sum / self.weight

    def keep(self, batch: Any, loss: float, weight: float) -> None:
        """Keep a batch, unless the limit is reached."""
        n_bytes = _n_bytes(batch)
        if self.batches and self.n_bytes + n_bytes > MAX_BYTES:
            return
        self.batches.append(batch)
        self.n_bytes += n_bytes
        self.loss_sum += loss * weight
        self.weight += weight

    def mean_loss(self, model: nn.Module, calibration: Calibration) -> float:
        """Mean loss of the model, as it is now, on the batches kept.

        Args:
            model: the model, with whatever adapters are active.
            calibration: gives the loss.

        Returns:
            The loss, weighted as in the pass.
        """
        total = 0.0
        with left_as_found(model, None, calibration.seed), torch.no_grad():
            for batch in self.batches:
                loss, weight = loss_and_weight(model, batch, calibration)
                total += float(loss) * weight
        return total / self.weight


def _n_bytes(batch: Any) -> int:
    if isinstance(batch, Tensor):
        return batch.numel() * batch.element_size()
    values = batch.values() if isinstance(batch, Mapping) else batch
    return sum(_n_bytes(v) for v in values) if isinstance(batch, Mapping | tuple | list) else 0
