"""Which process runs which part of the data.

There are two cases. Either all processes are given the same data, and each runs its share of every
batch. Or each is given data of its own (a `DistributedSampler`, `split_dataset_by_node`, a rank's
own files), and runs all of them. The first batch shows which case it is. Loaders that Accelerate
has prepared are undone first, since they repeat samples to make batches even.
"""

import copy
import dataclasses
import hashlib
import pickle
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from accelerate.data_loader import BatchSamplerShard, DataLoaderAdapter, IterableDatasetShard
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler

from ...errors import DataError
from ...layouts import Processes
from ..copying import fields_of
from ..guards import generators
from ..spec import Calibration
from .budget import Step
from .separable import sliced

_KEPT = (
    "collate_fn",
    "num_workers",
    "worker_init_fn",
    "generator",
    "timeout",
    "pin_memory",
    "prefetch_factor",
    "multiprocessing_context",
)
"""What a loader is made with, but its data and samplers. Workers do not outlive the pass."""


def shares(all_steps: Iterable[Step], world: Processes) -> Iterator[Step]:
    """The steps of this process, if all processes read the same steps.

    Every process gets equally many; some steps do not count on this one.
    """
    waiting: deque[Step] = deque()
    for step in all_steps:
        if step.orient and waiting:  # earlier steps must have been added before
            yield _share(waiting, world)
        waiting.extend(_parts(step, world.size))
        while len(waiting) >= world.size:
            yield _share(waiting, world)
    if waiting:
        yield _share(waiting, world)


def _share(waiting: deque[Step], world: Processes) -> Step:
    group = [waiting.popleft() for _ in range(min(world.size, len(waiting)))]
    orient = any(step.orient for step in group)
    if world.rank < len(group):
        return dataclasses.replace(group[world.rank], orient=orient)
    return dataclasses.replace(group[-1], orient=orient, counts=False)


def _parts(step: Step, n: int) -> list[Step]:
    """Cut a step between sequences into at most `n`; the first of them orients."""
    if not step.may_be_cut:
        return [step]
    size = -(-step.n_sequences // n)
    starts = range(0, step.n_sequences, size)
    return [
        dataclasses.replace(
            step, batch=sliced(step.batch, k, k + size), orient=step.orient and not k
        )
        for k in starts
    ]


def in_step(own: Iterator[Step], world: Processes) -> Iterator[Step]:
    """Keep the processes together until the last of them has run out of data."""
    last: Step | None = None
    while True:
        with world.together():
            step = next(own, None)
        reported = world.gather((step is not None, step is not None and step.orient))
        if not any(has for has, _ in reported):
            return
        if step is None and last is not None:
            step = dataclasses.replace(last, counts=False, n_tokens=0)
        if step is not None:
            last = dataclasses.replace(step, orient=any(orient for _, orient in reported))
            yield last


def unsharded(data: Any) -> Any:
    """Undo the sharding of a loader that Accelerate or a `DistributedSampler` shards.

    The result reads all of the data on every process; data that are not sharded stay as they are.
    """
    loader = data.base_dataloader if isinstance(data, DataLoaderAdapter) else data
    if not isinstance(loader, DataLoader):
        return data
    sampler, dataset = loader.batch_sampler, loader.dataset
    if isinstance(dataset, IterableDatasetShard):
        return _rebuilt(
            loader, dataset.dataset, batch_size=loader.batch_size, drop_last=loader.drop_last
        )
    if isinstance(sampler, BatchSamplerShard):
        return _rebuilt(loader, dataset, batch_sampler=sampler.batch_sampler)
    if isinstance(loader.sampler, DistributedSampler) and isinstance(sampler, BatchSampler):
        whole = _whole(loader.sampler)
        return _rebuilt(
            loader,
            dataset,
            batch_sampler=BatchSampler(whole, sampler.batch_size, sampler.drop_last),
        )
    return loader


def _whole(sampler: DistributedSampler[Any]) -> DistributedSampler[Any]:
    """A sampler of the same kind of all samples, in the same order."""
    whole = copy.copy(sampler)
    whole.num_replicas, whole.rank = 1, 0
    whole.num_samples = whole.total_size = len(sampler.dataset)  # type: ignore[arg-type]
    return whole


def _rebuilt(loader: DataLoader[Any], dataset: Any, **options: Any) -> DataLoader[Any]:
    """The loader with other data or another sampler, and all else as it was."""
    kept = {name: getattr(loader, name) for name in _KEPT}
    if not loader.num_workers:  # `DataLoader` refuses it
        kept["prefetch_factor"] = None
    return DataLoader(dataset, **kept, **options)


def share_generators(data: Any, world: Processes) -> None:
    """Make all processes shuffle as the first one does."""
    found = generators(data)
    states = world.gather([g.get_state() for g in found])[0]
    if len(states) == len(found):
        for generator, state in zip(found, states, strict=True):
            generator.set_state(state)


def check_all_have_data(calibration: Calibration, first: Any, world: Processes) -> None:
    """Refuse data that give a process no first batch (`DataError`, naming the processes)."""
    empty = [rank for rank, has in enumerate(world.gather(first is not None)) if not has]
    if empty:
        raise DataError(
            f"the calibration data ({type(calibration.data).__name__}) gave no batch on process "
            f"{', '.join(map(str, empty))} of {world.size}; give every process the same data, or a "
            "part of its own. A generator can be read only once."
        )


def digest(batch: Any) -> str:
    """Hash a batch: the same for the same data on any process."""
    hashed = hashlib.sha256()
    _update(hashed, batch)
    return hashed.hexdigest()


def _update(hashed: Any, value: Any) -> None:
    if (fields := fields_of(value)) is not None:
        value = fields
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        hashed.update(f"{value.dtype}{tuple(value.shape)}".encode())
        hashed.update(value.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, Mapping):
        for key in value:
            hashed.update(str(key).encode())
            _update(hashed, value[key])
    elif isinstance(value, tuple | list):
        for part in value:
            _update(hashed, part)
    else:
        hashed.update(pickle.dumps(value))
