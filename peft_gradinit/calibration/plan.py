"""What the statistics of a pass will hold, send and compute, before it runs.

The accumulators of a real pass are made on the meta device, given one token, oriented and factored
there: what they hold, sum and give is asked of them, so that no formula can differ from the code.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from ..statistics import (
    GradientStatistic,
    InputStatistic,
    TestMatrixPool,
    gradient_statistic,
    input_statistic,
)
from .batches import n_orientations

_META = torch.device("meta")


@dataclasses.dataclass(frozen=True)
class PassSize:
    """How much a pass reads, and how its statistics are kept.

    Attributes:
        n_sequences: over all processes.
        n_tokens: in them.
        n_processes: that share them.
        estimator: `"sketch"` or `"dense"`.
        sketch_size: columns of the sketches. `None`: the default for each layer's rank.
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
        held_bytes: by the accumulators on one process, once they are oriented.
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
        return Volume(
            self.held_bytes + other.held_bytes,
            self.summed_bytes + other.summed_bytes,
            self.agreed_bytes + other.agreed_bytes,
            self.factor_bytes + other.factor_bytes,
            self.flops + other.flops,
        )

    def __mul__(self, n: int) -> "Volume":
        return Volume(
            self.held_bytes * n,
            self.summed_bytes * n,
            self.agreed_bytes * n,
            self.factor_bytes * n,
            self.flops * n,
        )


@dataclasses.dataclass(frozen=True)
class Plan:
    """Costs of the statistics of a pass, next to those of keeping whole matrices.

    Attributes:
        n_orientations: how often the sketches are turned towards what was seen.
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
    statistic: str,
    size: PassSize,
    *,
    shares: Mapping[str, float] | None = None,
    groups: Sequence[Sequence[str]] | None = None,
    centered: bool = True,
) -> Plan:
    """Add up what the statistics of a pass will cost.

    Args:
        targets: `[out, in, rank]` by name, as in a fingerprint; each expert is a name of its own.
        statistic: `"gradient"` or `"inputs"`.
        size: of the pass.
        shares: the part of the tokens that reaches a layer, for layers that not all of them reach.
        groups: for inputs, names of the layers that are given the same tensors, which share one
            statistic. Default: none share, an upper bound.
        centered: for inputs, whether components are of `x - mean`.

    Returns:
        The costs. Every layer is taken to be reached; an expert that no token is routed to holds
        and sends nothing.
    """
    shares, pool = shares or {}, TestMatrixPool()
    whole = dataclasses.replace(size, estimator="dense")
    gradients = statistic == "gradient"
    owners = targets if groups is None or gradients else [group[0] for group in groups]
    kinds = Counter((*targets[name], shares.get(name, 1.0)) for name in owners)
    total, dense, largest = Volume(), Volume(), Volume()
    factor_bytes: dict[tuple[int, ...], int] = {}
    for (*target, share), n in kinds.items():
        cost = _volume(_layer(target, gradients, size, pool, centered), size, share)
        exact = _volume(_layer(target, gradients, whole, pool, centered), whole, share, once=True)
        total, dense = total + cost * n, dense + exact * n
        largest = max(largest, cost, key=lambda volume: volume.held_bytes)
        factor_bytes[_factored_as(target, gradients)] = cost.factor_bytes
    # Layers that share a statistic have factors of their own all the same.
    given = sum(factor_bytes[_factored_as(target, gradients)] for target in targets.values())
    return Plan(
        n_orientations=n_orientations(size.n_sequences),
        sketched=dataclasses.replace(total, factor_bytes=given),
        dense=dataclasses.replace(dense, factor_bytes=given),
        test_matrix_bytes=pool.n_bytes(),
        largest_layer=largest,
    )


def _flops_of_addmm_(_: Sequence[int], a: Sequence[int], b: Sequence[int], **__: object) -> int:
    """The product that adds in place, which the counter of torch does not know."""
    return 2 * a[0] * a[1] * b[1]


class _Layer(NamedTuple):
    """An accumulator on the meta device.

    Attributes:
        statistic: itself.
        add: gives it a token.
        sent: what one sum over processes sends of it.
        orients: whether it is summed where the sketches are oriented, too.
        factors: what is broadcast and kept of it.
    """

    statistic: GradientStatistic | InputStatistic
    add: Callable[[], None]
    sent: Callable[[], Sequence[Tensor]]
    orients: bool
    factors: Callable[[], Sequence[Tensor]]


def _layer(
    target: Sequence[int], gradients: bool, size: PassSize, pool: TestMatrixPool, centered: bool
) -> _Layer:
    out_features, in_features, rank = target
    x = torch.empty(1, in_features, device=_META)
    options = {
        "rank": rank if gradients else min(rank, in_features),
        "estimator": size.estimator,
        "sketch_size": size.sketch_size,
        "seed": 0,
        "pool": pool,
    }
    if gradients:
        dy = torch.empty(1, out_features, device=_META)
        gradient = gradient_statistic((out_features, in_features), **options)
        return _Layer(
            gradient,
            add=lambda: gradient.add(x, dy),
            sent=lambda: gradient.sums(_META),
            orients=gradient.can_orient,
            factors=lambda: gradient.triplets(options["rank"]),
        )
    inputs = input_statistic(in_features, centered=centered, **options)
    return _Layer(
        inputs,
        add=lambda: inputs.add(x),
        sent=lambda: [*inputs.sums(_META), inputs.point(_META)],
        orients=True,
        factors=lambda: inputs.components(options["rank"]),
    )


def _volume(layer: _Layer, size: PassSize, share: float, *, once: bool = False) -> Volume:
    """The costs of one layer over the pass.

    Args:
        layer: empty.
        size: of the pass.
        share: part of the tokens that reaches the layer.
        once: sum at the end alone, as methods do that have nothing to orient.

    Returns:
        The costs.
    """
    products = {torch.ops.aten.addmm_: _flops_of_addmm_}
    with FlopCounterMode(display=False, custom_mapping=products) as counter:
        layer.add()
    summed = _bytes(layer.sent())
    n = n_orientations(size.n_sequences) if layer.orients and not once else 0
    if n:
        layer.statistic.orient()
    alone = size.n_processes == 1
    return Volume(
        held_bytes=layer.statistic.n_bytes(),
        summed_bytes=0 if alone else (n + 1) * summed,
        agreed_bytes=0 if alone else n * _bytes(layer.statistic.oriented()),
        factor_bytes=_bytes(layer.factors()),
        flops=size.n_tokens * share * counter.get_total_flops(),
    )


def _factored_as(target: Sequence[int], gradients: bool) -> tuple[int, ...]:
    """What the size of the factors depends on: of inputs, there is no left side."""
    return tuple(target if gradients else target[1:])


def _bytes(tensors: Sequence[Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)
