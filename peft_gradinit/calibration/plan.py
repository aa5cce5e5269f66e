"""What the statistics of a pass will hold, send and compute, before it runs.

The accumulators of a real pass are created on the meta device, given one token, oriented and
factored there. Their own sizes are added up, so that no formula can differ from the code.
"""

import dataclasses
import operator
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..statistics import TestMatrixPool
from .feed import n_orientations
from .needs import Estimator, Measured

_META = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class PassSize:
    """How much a pass reads, and how its statistics are kept.

    `n_sequences` and `n_tokens` are totals over `n_processes`; for the others see `Calibration`.
    """

    n_sequences: int
    n_tokens: int
    n_processes: int = 1
    estimator: str = "sketch"
    sketch_size: int | None = None


@dataclasses.dataclass(frozen=True)
class Volume:
    """Costs of statistics: of one layer, or of all together.

    Attributes:
        held_bytes: of the accumulators on one process, once they are oriented.
        summed_bytes: payload of all sums over processes (`all_reduce`), over the whole pass.
        agreed_bytes: payload of broadcasts of oriented test matrices, over the whole pass.
        factor_bytes: of the triplets: broadcast once, and written to the result's file.
        flops: of the products that fill the accumulators, on all processes together; a
            multiplication and an addition are two.
    """

    held_bytes: int = 0
    summed_bytes: int = 0
    agreed_bytes: int = 0
    factor_bytes: int = 0
    flops: float = 0.0

    def __add__(self, other: "Volume") -> "Volume":
        return Volume(*map(operator.add, dataclasses.astuple(self), dataclasses.astuple(other)))

    def __mul__(self, n: int) -> "Volume":
        return Volume(*(cost * n for cost in dataclasses.astuple(self)))


@dataclasses.dataclass(frozen=True)
class Plan:
    """Costs of the statistics of a pass, next to those of keeping whole matrices.

    Attributes:
        n_orientations: how often the sketches are oriented.
        sketched: what the pass will cost.
        dense: what whole gradients (for inputs: second moments) would cost, summed once.
        test_matrix_bytes: of the random test matrices, which layers share.
        largest_layer: the costs of the layer that holds most.
    """

    n_orientations: int
    sketched: Volume
    dense: Volume
    test_matrix_bytes: int
    largest_layer: Volume


def plan_pass(
    targets: Mapping[str, Sequence[int]],
    need: Measured,
    size: PassSize,
    *,
    shares: Mapping[str, float] | None = None,
    groups: Sequence[Sequence[str]] | None = None,
) -> Plan:
    """Add up what the statistics of a pass will cost.

    Every layer is assumed to be reached; an expert without tokens holds and sends nothing.

    Args:
        targets: `[out, in, rank]` by name, as in a fingerprint; each expert is a name of its own.
        need: what is measured.
        size: of the pass.
        shares: share of the tokens that reaches a layer, for layers that not all tokens reach.
        groups: names of the layers with the same inputs, which share one statistic of them.
            Default: none share, an upper bound.
    """
    shares, pool = shares or {}, TestMatrixPool()
    whole = dataclasses.replace(size, estimator="dense")
    # Gradients are never shared.
    owners = targets if groups is None or need.backward else [group[0] for group in groups]
    kinds = Counter((*targets[name], shares.get(name, 1.0)) for name in owners)
    total, dense, largest = Volume(), Volume(), Volume()
    factor_bytes: dict[tuple[int, ...], int] = {}
    for (*target, share), n in kinds.items():
        cost = _volume(need, target, size, share, pool)
        exact = _volume(need, target, whole, share, pool, once=True)
        total, dense = total + cost * n, dense + exact * n
        largest = max(largest, cost, key=lambda volume: volume.held_bytes)
        factor_bytes[tuple(target)] = cost.factor_bytes
    # Layers that share a statistic still have factors of their own.
    for target in map(tuple, targets.values()):
        if target not in factor_bytes:
            factor_bytes[target] = _volume(need, target, size, 1.0, pool).factor_bytes
    given = sum(factor_bytes[tuple(target)] for target in targets.values())
    return Plan(
        n_orientations=n_orientations(size.n_sequences),
        sketched=dataclasses.replace(total, factor_bytes=given),
        dense=dataclasses.replace(dense, factor_bytes=given),
        test_matrix_bytes=pool.n_bytes(),
        largest_layer=largest,
    )


def _flops_of_addmm_(_: Sequence[int], a: Sequence[int], b: Sequence[int], **__: object) -> int:
    """Flops of the product that adds in place, which the counter of torch does not know."""
    return 2 * a[0] * a[1] * b[1]


def _volume(
    need: Measured,
    target: Sequence[int],
    size: PassSize,
    share: float,
    pool: TestMatrixPool,
    *,
    once: bool = False,
) -> Volume:
    """The costs of one layer over the pass; `once`: sums are added up at the end alone.

    `target` is `[out, in, rank]`, and `share` the share of the tokens that reaches the layer.
    """
    out_features, in_features, rank = target
    shape = (out_features, in_features)
    estimator = Estimator(size.estimator, size.sketch_size, 0, pool)
    statistic: Any = need.accumulator(shape, rank, estimator)
    products = {torch.ops.aten.addmm_: _flops_of_addmm_}
    with FlopCounterMode(display=False, custom_mapping=products) as counter:
        statistic.add(*need.token(shape, _META))
    point = statistic.point(_META)
    summed = _bytes([*statistic.sums(_META), *([] if point is None else [point])])
    orients = (statistic.can_orient or need.may_settle) and not once
    n = n_orientations(size.n_sequences) if orients else 0
    if n:
        statistic.orient()
    alone = size.n_processes == 1
    return Volume(
        held_bytes=statistic.n_bytes(),
        summed_bytes=0 if alone else (n + 1) * summed,
        agreed_bytes=0 if alone else n * _bytes(statistic.oriented()),
        factor_bytes=_bytes(list(need.read(statistic, rank).values())),
        flops=size.n_tokens * share * counter.get_total_flops(),
    )


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
