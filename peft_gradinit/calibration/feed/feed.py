"""`Feed`: the steps of a pass on this process; reads, cuts, shares out and counts."""

import dataclasses
from collections.abc import Iterable, Iterator
from itertools import chain
from typing import Any

from torch import nn

from ...layouts import Processes
from ..spec import Calibration
from .batches import budgeted, read
from .budget import Budget, Step
from .separable import is_mean_over_rows
from .shards import check_all_have_data, digest, in_step, share_generators, shares, unsharded


class Feed:
    """The steps of a pass on this process, in time with the other processes.

    All processes get equally many steps; on those that lack data of their own, steps do not count.

    Args:
        calibration: data and budgets; the budgets are those of all processes together.
        model: decides the device and the columns of dataset samples.
        world: the processes that share the data. Default: this one alone.
        computes_loss: whether the steps are for a loss, which may be of several rows together.

    Attributes:
        budget: counts what was read on this process.
    """

    def __init__(
        self,
        calibration: Calibration,
        model: nn.Module,
        world: Processes | None = None,
        *,
        computes_loss: bool = True,
    ) -> None:
        self._calibration = calibration
        self._model = model
        self._world = world or Processes()
        self._separable = calibration.loss_fn is None and (
            not computes_loss or is_mean_over_rows(model)
        )
        self.budget = Budget(calibration)

    def __iter__(self) -> Iterator[Step]:
        calibration, model = self._calibration, self._model
        world, budget = self._world, self.budget
        if world.size == 1:
            yield from self._steps(read(calibration, model))
            return
        with world.together():
            calibration = dataclasses.replace(calibration, data=unsharded(calibration.data))
            share_generators(calibration.data, world)
            batches = read(calibration, model)
            first = next(batches, None)
        check_all_have_data(calibration, first, world)
        same = len(set(world.gather(digest(first)))) == 1
        if not same:
            budget.divide(world.size)
        own = self._steps(chain([first], batches))
        yield from in_step(shares(own, world) if same else own, world)

    def _steps(self, batches: Iterable[Any]) -> Iterator[Step]:
        return budgeted(
            batches, self._calibration, self._model, self.budget, separable=self._separable
        )
