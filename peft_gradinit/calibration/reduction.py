"""Statistics of all processes, added up; factors that are the same on every one of them."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from ..linalg import TruncatedSVD
from ..statistics import GradientStatistic, InputStatistic
from .processes import Processes
from .sharing import SharedInputs


def sum_gradients(
    statistics: Mapping[str, GradientStatistic], device: torch.device, world: Processes
) -> None:
    """Give every process the sums over all of them.

    Args:
        statistics: of this process, by module name; the same names everywhere.
        device: where sums are made that do not exist yet.
        world: the processes.
    """
    told = world.gather({n: (s.weight, s.n_calls) for n, s in statistics.items()})
    tensors: list[Tensor] = []
    for name, statistic in statistics.items():
        statistic.weight = sum(numbers[name][0] for numbers in told)
        statistic.n_calls = sum(numbers[name][1] for numbers in told)
        if statistic.n_calls:
            tensors += statistic.sums(device)
    world.sum_(tensors)


def orient_gradients(
    statistics: Mapping[str, GradientStatistic], device: torch.device, world: Processes
) -> None:
    """Orient all sketches by what all processes have seen so far; the first one keeps their sums.

    Exact gradients have nothing to orient: each process keeps its own sums of them, to the end.

    Args:
        statistics: of this process, by module name; the same names everywhere.
        device: where sums are made that do not exist yet.
        world: the processes.
    """
    sketches = {name: s for name, s in statistics.items() if s.can_orient}
    if world.size > 1:
        sum_gradients(sketches, device, world)
    for sketch in sketches.values():
        if sketch.n_calls or world.size == 1:
            sketch.orient()
    _agree([t for sketch in sketches.values() for t in sketch.oriented()], world)
    if world.rank > 0:
        for sketch in sketches.values():
            sketch.clear()


def sum_inputs(shared: SharedInputs, device: torch.device, world: Processes) -> None:
    """Give every process the sums over all of them.

    Args:
        shared: statistics of this process.
        device: where sums are made that do not exist yet.
        world: the processes.
    """
    shared.part(_groups(shared, world))
    statistics = shared.distinct()
    told = world.gather([(s.n_tokens, s.n_calls) for s in statistics])
    used: list[InputStatistic] = []
    tokens: list[int] = []
    for i, statistic in enumerate(statistics):
        total = sum(numbers[i][0] for numbers in told)
        if total:
            used.append(statistic)
            tokens.append(total)
        statistic.n_calls = sum(numbers[i][1] for numbers in told)
    _move_to_common_point(used, tokens, device, world)
    world.sum_([tensor for statistic in used for tensor in statistic.sums(device)])
    for statistic, total in zip(used, tokens, strict=True):
        statistic.n_tokens = total


def orient_inputs(shared: SharedInputs, device: torch.device, world: Processes) -> None:
    """Orient all sketches by what all processes have seen so far; the sums stay on all of them.

    Exact second moments are summed as well, since whether to stop is decided by all layers.

    Args:
        shared: statistics of this process.
        device: where sums are made that do not exist yet.
        world: the processes.
    """
    if world.size > 1:
        sum_inputs(shared, device, world)
    statistics = shared.distinct()
    for statistic in statistics:
        statistic.orient()
    _agree([t for s in statistics for t in s.oriented()], world)


def keep_on_first(shared: SharedInputs, world: Processes) -> None:
    """Leave sums that all processes have to the first one, so that they count once."""
    if world.rank > 0:
        for statistic in shared.distinct():
            statistic.clear()


def factored(
    names: Sequence[str], triplets_of: Callable[[str], TruncatedSVD], world: Processes
) -> dict[str, TruncatedSVD]:
    """Factor each layer on one process, in turn, and give the factors to all.

    Args:
        names: layers; the same on every process.
        triplets_of: factors one of them.
        world: the processes.

    Returns:
        Triplets by name, bit for bit the same on every process.
    """
    with world.together():
        mine = {name: triplets_of(name) for name in names[world.rank :: world.size]}
    if world.size == 1:
        return mine
    device = next((svd.S.device for svd in mine.values()), torch.device("cpu"))
    shapes = world.gather({n: [tuple(part.shape) for part in svd] for n, svd in mine.items()})
    found: dict[str, TruncatedSVD] = {}
    for owner, theirs in enumerate(shapes):
        for name, sizes in theirs.items():
            empty = TruncatedSVD(*(torch.empty(size, device=device) for size in sizes))
            found[name] = mine[name] if owner == world.rank else empty
        world.broadcast_([part for name in theirs for part in found[name]], owner)
    return {name: found[name] for name in names}


def _agree(tensors: Sequence[Tensor], world: Processes) -> None:
    """Take the first process's values: those of other devices may round differently."""
    world.broadcast_(tensors, 0)


def _groups(shared: SharedInputs, world: Processes) -> list[list[str]]:
    """Layers that share a statistic on every process."""
    keys = world.gather({name: i for i, group in enumerate(shared.groups()) for name in group})
    groups: dict[tuple[int, ...], list[str]] = {}
    for name in keys[0]:
        groups.setdefault(tuple(of[name] for of in keys), []).append(name)
    return list(groups.values())


def _move_to_common_point(
    statistics: Sequence[InputStatistic],
    tokens: Sequence[int],
    device: torch.device,
    world: Processes,
) -> None:
    """Take sums about the mean of the processes' points, weighted by their tokens."""
    points = [s.point(device) * (s.n_tokens / n) for s, n in zip(statistics, tokens, strict=True)]
    world.sum_(points)
    for statistic, point in zip(statistics, points, strict=True):
        statistic.move_to(point)
