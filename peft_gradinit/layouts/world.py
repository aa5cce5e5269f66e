"""The processes of a distributed run, and what they send each other during a pass.

Rank and world size are those of `torch.distributed`. No `Accelerator` is created, since the first
one decides the settings of all later ones. Python objects go over a gloo group of their own: they
cannot be mistaken for a collective of a sharded model, and the loss of a process is noticed within
`TIMEOUT`. Sums of tensors go over the default group of their device.
"""

import contextlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor, nn

from ..errors import CalibrationError
from .offloading import execution_device
from .tensor_parallel import replicas

TIMEOUT = timedelta(minutes=10)
"""How long a process waits for the others at one step: longer than any step should take."""

BUCKET = 64 * 2**20
"""Floats in one collective, at most."""


class Processes:
    """The processes that share a pass; by default one alone, which sends nothing.

    `device` is where tensors are when they are sent: that of the model's first layer. Tensors that
    are elsewhere, or nowhere on some process, take part all the same.
    """

    def __init__(
        self,
        rank: int = 0,
        size: int = 1,
        control: Any = None,
        group: Any = None,
        device: torch.device | None = None,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device or torch.device("cpu")
        self._control = control
        self._group = group

    def gather(self, value: Any) -> list[Any]:
        """Every process's value (anything that can be pickled), by rank.

        Raises:
            CalibrationError: if a process is lost.
        """
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        try:
            dist.all_gather_object(values, value, group=self._control)
        except RuntimeError as error:
            raise CalibrationError(
                f"process {self.rank} of {self.size} lost another one during the calibration "
                f"({str(error).splitlines()[0]}); look at the log of the process that ended first, "
                "and run the calibration on every process, outside main_process_first()."
            ) from error
        return values

    @contextmanager
    def together(self) -> Iterator[None]:
        """Run a block that all processes run; if it fails on one, it fails on all.

        Raises:
            CalibrationError: on the other processes, naming the one that failed and its error.
        """
        failure: BaseException | None = None
        try:
            yield
        except BaseException as error:  # noqa: BLE001 raised again below
            failure = error
        if self.size > 1:
            message = None if failure is None else f"{type(failure).__name__}: {failure}"
            try:
                messages = self.gather(message)
            except CalibrationError:
                if failure is None:
                    raise
                messages = []
            self._raise_for(messages if failure is None else [])
        if failure is not None:
            raise failure

    def _raise_for(self, messages: Sequence[str | None]) -> None:
        for rank, message in enumerate(messages):
            if message is not None:
                raise CalibrationError(
                    f"the calibration failed on process {rank} of {self.size}: {message}"
                )

    def total(self, *numbers: float) -> list[float]:
        """Sums of numbers over the processes."""
        return [sum(column) for column in zip(*self.gather(numbers), strict=True)]

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Add float32 tensors over the processes, in place; each passes the same shapes."""
        if self.size > 1:
            self._in_buckets(tensors, dist.all_reduce)

    def broadcast_(self, tensors: Sequence[Tensor], source: int) -> None:
        """Copy float32 tensors of the process `source` to all, in place; each has equal shapes."""
        if self.size > 1:
            self._in_buckets(
                tensors, lambda flat, group: dist.broadcast(flat, group=group, group_src=source)
            )

    def _in_buckets(self, tensors: Sequence[Tensor], collective: Any) -> None:
        for bucket in _buckets(tensors):
            flat = torch.cat([t.reshape(-1).to(self.device) for t in bucket])
            # gloo serves the CPU where the default group is that of an accelerator.
            collective(flat, group=self._control if flat.device.type == "cpu" else self._group)
            parts = flat.split([t.numel() for t in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))


@contextmanager
def processes(model: nn.Module) -> Iterator[Processes]:
    """Yield the processes that share the data of a pass; all of them run the block.

    Under tensor parallelism, processes with parts of one replica read the same data. Processes with
    the same part of different replicas share the data. Without a launcher there is one process.
    """
    if not dist.is_available() or not _is_launched():
        yield Processes()
        return
    control, group = _groups(replicas(model))
    try:
        rank, size = dist.get_rank(control), dist.get_world_size(control)
        yield Processes(rank, size, control, group, execution_device(model))
    finally:
        with contextlib.suppress(RuntimeError, ValueError):  # the whole run may be gone
            dist.destroy_process_group(control)


@contextmanager
def agreed(model: nn.Module) -> Iterator[None]:
    """Run a block on all processes of a run; if it fails on one, it fails on all."""
    with processes(model) as world, world.together():
        yield


def process_state() -> PartialState:
    """Accelerate's view of the processes; joins those that a launcher has started.

    Without an accelerator, Accelerate joins them only if it is told that it runs on the CPU.
    """
    return PartialState(cpu=not torch.accelerator.is_available())


def _groups(parts: list[list[int]] | None) -> tuple[Any, Any]:
    """Make a group for Python objects, and one for tensors on an accelerator; `None`: the default.

    `parts` are the ranks of each group; `None`: one group of all.

    Raises:
        CalibrationError: if the other processes do not come.
    """
    try:
        if parts is None:
            return dist.new_group(backend="gloo", timeout=TIMEOUT), None
        enumerated = dist.new_subgroups_by_enumeration
        control, _ = enumerated(parts, backend="gloo", timeout=TIMEOUT)
        return control, enumerated(parts)[0] if torch.accelerator.is_available() else None
    except RuntimeError as error:
        raise CalibrationError(
            f"process {dist.get_rank()} of {dist.get_world_size()} waited {TIMEOUT} for the others "
            "to begin the calibration; run it on every process, outside main_process_first()."
        ) from error


def _is_launched() -> bool:
    """Whether there are several processes; joins them if a launcher has started them."""
    if not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        process_state()
    return dist.is_initialized() and dist.get_world_size() > 1


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Cut by sizes alone, which all processes agree on; where tensors are differs between them."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.numel() for t in bucket) + tensor.numel() > BUCKET
        if bucket and full:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
