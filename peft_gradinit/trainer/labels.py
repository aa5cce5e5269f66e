"""How many labels a training step has, on which the learning rate depends."""

import itertools
import statistics
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..errors import DataError
from .understudy import TrainingBatches, as_in_training, bookkeeping, understudy_of

if TYPE_CHECKING:
    from transformers import Trainer

N_BATCHES = 4
IGNORED = -100
"""The label that Transformers' losses leave out."""


def labels_per_step(trainer: "Trainer", model: nn.Module) -> float | None:
    """The labels with loss of one step of the optimiser, over all devices and accumulated batches.

    The mean of the trainer's first batches, which are read as for a calibration and leave no trace. `None` if
    they have no labels, or the data are a stream that cannot be read twice.
    """
    try:
        understudy = understudy_of(trainer)
    except DataError:
        return None
    with bookkeeping(trainer.accelerator), as_in_training(model, seed=0):
        batches = itertools.islice(TrainingBatches(understudy), N_BATCHES)
        counts = [_n_labels(batch, trainer.label_names) for batch in batches]
    known = [count for count in counts if count]
    if not known:
        return None
    n_batches = trainer.get_total_train_batch_size(trainer.args) / understudy._train_batch_size
    return n_batches * statistics.mean(known)


def _n_labels(batch: Any, names: list[str]) -> int:
    """The labels with loss of a batch; of numbers to predict, one a row."""
    if not isinstance(batch, Mapping):
        return 0
    found = (batch.get(name) for name in names)
    return sum(_n_counted(labels) for labels in found if isinstance(labels, Tensor))


def _n_counted(labels: Tensor) -> int:
    if torch.is_floating_point(labels):
        return len(labels) if labels.dim() else 1
    return int((labels != IGNORED).sum())
