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
    once: Mapping[str, int] | None = None,
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
        once: what a layer that gets ranks costs besides, such as DoRA's magnitudes. Default: nothing.
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
    costs, once = costs or dict.fromkeys(ordered, 1), once or dict.fromkeys(ordered, 0)

    def price(name: str, rank: int) -> int:
        """What one more rank costs."""
        return costs[name] + (0 if rank else once[name])

    least = sum(min_rank * costs[n] + (once[n] if min_rank else 0) for n in ordered)
    largest = sum(r * costs[name] + (once[name] if r else 0) for name, r in most.items())
    _check(ordered, min_rank, most)
    if not least <= budget <= largest:
        unit = "ranks" if all(costs[name] == 1 for name in ordered) else "trained numbers"
        raise ShapeError(
            f"a budget of {budget} {unit} cannot be kept by {len(ordered)} layers that take between "
            f"{least} and {largest} together (min_rank={min_rank}); change the budget, min_rank or "
            "max_rank, or measure more components (rho)."
        )
    candidates = sorted(
        (-score / price(name, index), index, name)
        for name, values in ordered.items()
        for index, score in enumerate(values[: most[name]])
        if index >= min_rank
    )
    ranks, left = dict.fromkeys(ordered, min_rank), budget - least
    for _, _, name in candidates:
        if (asked := price(name, ranks[name])) <= left:
            ranks[name] += 1
            left -= asked
    return ranks


def _check(ordered: Mapping[str, list[float]], min_rank: int, most: Mapping[str, int]) -> None:
    for name, values in ordered.items():
        if any(math.isnan(value) for value in values):
            raise ShapeError(f"{name} has a score that is NaN; scores must be numbers: {values}.")
        if most[name] < min_rank or min_rank < 0:
            raise ShapeError(
                f"{name} can have between 0 and {most[name]} ranks, but min_rank={min_rank} was "
                "asked for; lower min_rank, or measure more components."
            )
