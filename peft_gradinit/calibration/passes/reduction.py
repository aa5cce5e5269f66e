"""Adds up the statistics of all processes, and gives all of them the same factors."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...layouts import Processes
from ...statistics import Statistic, in_groups


def sum_over(statistics: Sequence[Statistic], device: torch.device, world: Processes) -> None:
    """Give every process the sums over all of them.

    Every process passes the same layers' statistics; missing sums are zeros on `device`.
    """
    reported = world.gather([(s.weight, s.n_calls, s.has_sums) for s in statistics])
    used: list[Statistic] = []
    weights: list[float] = []
    for i, statistic in enumerate(statistics):
        weight = sum(numbers[i][0] for numbers in reported)
        if weight and any(numbers[i][2] for numbers in reported):
            used.append(statistic)
            weights.append(weight)
        else:
            statistic.weight = weight
        statistic.n_calls = sum(numbers[i][1] for numbers in reported)
    _move_to_common_point(used, weights, device, world)
    world.sum_([tensor for statistic in used for tensor in statistic.sums(device)])
    for statistic, weight in zip(used, weights, strict=True):
        statistic.weight = weight


def orient(statistics: Sequence[Statistic], device: torch.device, world: Processes) -> None:
    """Orient sketches by the data of all processes so far; the sums stay on all of them."""
    if world.size > 1:
        sum_over(statistics, device, world)
    in_groups(statistics, lambda statistic: statistic, _oriented)
    # The first process's values: those of other devices may round differently.
    world.broadcast_([t for s in statistics for t in s.oriented()], 0)


def _oriented(group: list[Statistic]) -> list[Statistic]:
    group[0].orient_alike(group)
    return group


def keep_on_first(statistics: Sequence[Statistic], world: Processes) -> None:
    """Clear sums that all processes have on all but the first, so that they count once."""
    if world.rank > 0:
        for statistic in statistics:
            statistic.clear()


def shared_out(
    names: Sequence[str],
    read: Callable[[Sequence[str]], Mapping[str, Mapping[str, Tensor]]],
    world: Processes,
) -> dict[str, dict[str, Tensor]]:
    """Read each layer on one process, in turn, and give all of them the same bits."""
    with world.together():
        mine = {name: dict(of) for name, of in read(names[world.rank :: world.size]).items()}
    if world.size == 1:
        return mine
    shapes = world.gather({n: {k: tuple(t.shape) for k, t in of.items()} for n, of in mine.items()})
    found: dict[str, dict[str, Tensor]] = {}
    for owner, theirs in enumerate(shapes):
        for name, sizes in theirs.items():
            options: Any = {"dtype": torch.float32, "device": world.device}
            empty = {part: torch.empty(size, **options) for part, size in sizes.items()}
            found[name] = mine[name] if owner == world.rank else empty
        world.broadcast_([t for name in theirs for t in found[name].values()], owner)
    return {name: found[name] for name in names}


def _move_to_common_point(
    statistics: Sequence[Statistic],
    weights: Sequence[float],
    device: torch.device,
    world: Processes,
) -> None:
    """Re-centre sums on the mean of the processes' points, weighted by their data."""
    moved, points = [], []
    for statistic, weight in zip(statistics, weights, strict=True):
        if (point := statistic.point(device)) is not None:
            moved.append(statistic)
            points.append(point * (statistic.weight / weight))
    world.sum_(points)
    for statistic, point in zip(moved, points, strict=True):
        statistic.move_to(point)
