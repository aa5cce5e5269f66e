"""Shares a budget among layers: the components with the largest scores for their cost are kept."""

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from ..errors import ShapeError


def allocate_ranks(
    scores: Mapping[str, Tensor | Sequence[float]],
    budget: int,
    *,
    costs: Mapping[str, int] | None = None,
    min_rank: int = 0,
    max_rank: int | None = None,
) -> dict[str, int]:
    """Share `budget` so that the sum of the kept scores is largest.

    Every layer first gets its `min_rank` largest scores; the rest of the budget goes to the largest
    scores that remain in any layer. Within a layer this keeps a leading part, so the result is a
    rank. Ties go to the smaller rank, then to the name that sorts first: the order of the mapping
    does not matter.

    With `costs`, scores are compared by what they give for a unit of the budget. A rank that costs
    more than is left is passed over, and a cheaper one may follow.

    Args:
        scores: by layer, one number for each component that may be kept, such as its share of the
            explained variance; sorted here. A layer cannot get more ranks than it has scores.
        budget: total of the ranks, kept exactly; with `costs`, of the costs, never exceeded.
        costs: what one rank of each layer costs, such as its trained numbers. Default: 1 each.
        min_rank: the least that every layer gets. 0: a layer may lose its adapter.
        max_rank: the most that a layer gets. Default: as many as it has scores.

    Returns:
        The rank of every layer, in the order of `scores`.

    Raises:
        ShapeError: if no ranks within the limits use up `budget`, or a score is NaN.
    """
    ordered = {name: sorted((float(s) for s in v), reverse=True) for name, v in scores.items()}
    most = {
        name: len(v) if max_rank is None else min(max_rank, len(v)) for name, v in ordered.items()
    }
    costs = costs or dict.fromkeys(ordered, 1)
    _check(ordered, budget, min_rank, most, costs)
    candidates = sorted(
        (-score / costs[name], index, name)
        for name, values in ordered.items()
        for index, score in enumerate(values[: most[name]])
        if index >= min_rank
    )
    ranks = dict.fromkeys(ordered, min_rank)
    left = budget - min_rank * sum(costs[name] for name in ordered)
    for _, _, name in candidates:
        if costs[name] <= left:
            ranks[name] += 1
            left -= costs[name]
    return ranks


def _check(
    ordered: Mapping[str, list[float]],
    budget: int,
    min_rank: int,
    most: Mapping[str, int],
    costs: Mapping[str, int],
) -> None:
    for name, values in ordered.items():
        if any(math.isnan(value) for value in values):
            raise ShapeError(f"{name} has a score that is NaN; scores must be numbers: {values}.")
        if most[name] < min_rank or min_rank < 0:
            raise ShapeError(
                f"{name} can have between 0 and {most[name]} ranks, but min_rank={min_rank} was "
                "asked for; lower min_rank, or measure more components."
            )
    least = min_rank * sum(costs[name] for name in ordered)
    largest = sum(n * costs[name] for name, n in most.items())
    if not least <= budget <= largest:
        unit = "ranks" if all(costs[name] == 1 for name in ordered) else "trained numbers"
        raise ShapeError(
            f"a budget of {budget} {unit} cannot be kept by {len(ordered)} layers that take between "
            f"{least} and {largest} together (min_rank={min_rank}); change the budget, min_rank or "
            "max_rank, or measure more components (rho)."
        )
