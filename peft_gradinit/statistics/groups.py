"""Factorisations for many layers: on all threads of the CPU, or stacked on an accelerator.

A small factorisation keeps one core busy, and a GPU hardly at all. So the CPU makes as many at once
as there are threads. An accelerator makes one of a stack of layers that have the same shape.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import torch

from ..linalg import on_all_threads
from .base import Statistic

T = TypeVar("T")
R = TypeVar("R")

STACKED_BYTES = 2**27
"""Memory of the sums in one stack, at most: a dozen layers of 4096 x 4096 at rank 8."""


class Kind(NamedTuple):
    """What can be stacked with each other."""

    device: torch.device
    description: str
    size: int


def in_groups(
    items: Sequence[T],
    statistic_of: Callable[[T], Statistic],
    work: Callable[[list[T], int], Sequence[R]],
    sizes: Sequence[int] | None = None,
) -> list[R]:
    """Work on the statistics of many layers, in groups of one kind.

    Args:
        items: what has a statistic: names of layers, or the statistics themselves.
        statistic_of: the statistic of an item.
        work: takes items of one kind and their size, and returns a result for each of them. It may
            run on any thread. On the CPU a group is a single item.
        sizes: how much will be read of each item; items of one group have the same size.

    Returns:
        A result for each item, in their order.
    """
    kinds = [
        Kind(statistic.device, statistic.describe(), size)
        for statistic, size in zip(map(statistic_of, items), sizes or [0] * len(items), strict=True)
    ]
    groups = _groups(kinds, [statistic_of(item).n_bytes() for item in items])

    def run(group: list[int]) -> Sequence[R]:
        return work([items[i] for i in group], kinds[group[0]].size)

    on_cpu = all(kind.device.type == "cpu" for kind in kinds)
    results = on_all_threads(run, groups) if on_cpu else [run(group) for group in groups]
    by_item = {
        i: r
        for group, of in zip(groups, results, strict=True)
        for i, r in zip(group, of, strict=True)
    }
    return [by_item[i] for i in range(len(items))]


def _groups(kinds: Sequence[Kind], n_bytes: Sequence[int]) -> list[list[int]]:
    """Indices of each group, in the order of its first item."""
    groups: list[list[int]] = []
    last: dict[Kind, list[int]] = {}
    for i, kind in enumerate(kinds):
        group = last.get(kind)
        room = kind.device.type != "cpu" and group is not None
        if room and sum(n_bytes[j] for j in group) + n_bytes[i] <= STACKED_BYTES:
            group.append(i)
        else:
            groups.append([i])
            last[kind] = groups[-1]
    return groups
