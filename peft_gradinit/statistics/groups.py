"""Factorisations for many layers: on all threads of the CPU, or stacked on an accelerator.

A small factorisation keeps one core busy, and a GPU hardly at all. So the CPU makes as many at once
as there are threads. An accelerator makes one of a stack of layers that have the same shape.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from ..linalg import on_all_threads
from .base import Statistic

T = TypeVar("T")
R = TypeVar("R")

STACKED_BYTES = 2**27
"""Memory of the sums in one stack, at most: a dozen layers of 4096 x 4096 at rank 8."""


def in_groups(
    items: Sequence[T],
    statistic_of: Callable[[T], Statistic],
    work: Callable[[list[T]], Sequence[R]],
    sizes: Sequence[int] | None = None,
) -> list[R]:
    """Work on the statistics of many layers, in groups of one kind.

    Args:
        items: what has a statistic: names of layers, or the statistics themselves.
        statistic_of: the statistic of an item.
        work: takes items of one kind, and returns a result for each of them. It may run on any
            thread. On the CPU a group is a single item.
        sizes: how much will be read of each item; items of one group have the same size.

    Returns:
        A result for each item, in their order.
    """
    statistics = [statistic_of(item) for item in items]
    on_cpu = all(statistic.device.type == "cpu" for statistic in statistics)
    groups = _groups(statistics, sizes or [0] * len(items))
    del statistics  # work may free them one after the other

    def run(group: list[int]) -> Sequence[R]:
        return work([items[i] for i in group])

    results = on_all_threads(run, groups) if on_cpu else [run(group) for group in groups]
    pairs = zip(itertools.chain(*groups), itertools.chain(*results), strict=True)
    return [result for _, result in sorted(pairs, key=operator.itemgetter(0))]


def _groups(statistics: Sequence[Statistic], sizes: Sequence[int]) -> list[list[int]]:
    """Indices of each group, in the order of its first item."""
    groups: list[list[int]] = []
    open_groups: dict[tuple[torch.device, str, int], list[int]] = {}
    for i, (statistic, size) in enumerate(zip(statistics, sizes, strict=True)):
        kind = (statistic.device, statistic.describe(), size)
        group = open_groups.get(kind)
        full = group is not None and (len(group) + 1) * statistic.n_bytes() > STACKED_BYTES
        if group is None or full or statistic.device.type == "cpu":
            group = open_groups[kind] = []
            groups.append(group)
        group.append(i)
    return groups
