"""Shares a budget among layers: the components with the largest scores for their cost are kept."""

import math
from collections.abc import Mapping, Sequence
from itertools import accumulate

from torch import Tensor

from ..errors import ShapeError


def allocate_ranks(
    scores: Mapping[str, Tensor | Sequence[float]],
    budget: int,
    *,
    costs: Mapping[str, int] | None = None,
    once: Mapping[str, int] | None = None,
    min_rank: int | Mapping[str, int] = 0,
    max_rank: int | None = None,
) -> dict[str, int]:
    """Share `budget` so that the sum of the kept scores is largest.

    Every layer first gets its `min_rank` largest scores; the rest of the budget goes to the largest
    scores that remain in any layer. Within a layer this keeps a leading part, so the result is a
    rank. Ties go to the smaller rank, then to the name that sorts first: the order of the mapping
    does not matter.

    With `costs`, scores are compared by what they give for a unit of the budget. A rank that costs
    more than is left is passed over, and a cheaper one may follow. The first ranks of a layer that
    costs something once are compared together, as long as that makes them gain more for their cost.
    So the sum is near the largest one, and the largest only if all costs are alike.

    Args:
        scores: by layer, one number for each component that may be kept, such as its share of the
            explained variance; sorted here. A layer cannot get more ranks than it has scores.
        budget: total of the ranks, kept exactly; with `costs`, of the costs, never exceeded.
        costs: what one rank of each layer costs, such as its trained numbers. Default: 1 each.
        once: what a layer that gets ranks costs besides, such as DoRA's magnitudes. Default: nothing.
        min_rank: the least that every layer gets, or by layer. 0: a layer may lose its adapter.
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

    lowest = min_rank if isinstance(min_rank, Mapping) else dict.fromkeys(ordered, min_rank)

    def price(name: str, rank: int) -> int:
        """What one more rank costs."""
        return costs[name] + (0 if rank else once[name])

    least, largest = (total_cost(ranks, costs, once) for ranks in (lowest, most))
    _check(ordered, lowest, most)
    if not least <= budget <= largest:
        unit = "ranks" if all(costs[name] == 1 for name in ordered) else "trained numbers"
        raise ShapeError(
            f"a budget of {budget} {unit} cannot be kept by {len(ordered)} layers that take between "
            f"{least} and {largest} together (min_rank={_said(lowest)}); change the budget, min_rank or "
            "max_rank, or measure more components (rho)."
        )
    candidates = sorted(
        (-gain, index, name)
        for name, values in ordered.items()
        for index, gain in _gains(values[: most[name]], lowest[name], costs[name], once[name])
    )
    ranks, left = {name: lowest[name] for name in ordered}, budget - least
    for _, _, name in candidates:
        if (asked := price(name, ranks[name])) <= left:
            ranks[name] += 1
            left -= asked
    return ranks


def total_cost(ranks: Mapping[str, int], costs: Mapping[str, int], once: Mapping[str, int]) -> int:
    """What ranks cost together; arguments by layer, as for `allocate_ranks`."""
    return sum(r * costs[name] + (once[name] if r else 0) for name, r in ranks.items())


def _gains(values: list[float], paid: int, cost: int, once: int) -> list[tuple[int, float]]:
    """What each rank of a layer from number `paid` on gains for a unit of the budget."""
    values = values[paid:]
    together = [
        total / ((k + 1) * cost + (0 if paid else once))
        for k, total in enumerate(accumulate(values))
    ]
    n = together.index(max(together)) + 1 if together else 0
    gains = [*together[n - 1 : n] * n, *(value / cost for value in values[n:])]
    return list(enumerate(gains, paid))


def _said(lowest: Mapping[str, int]) -> str:
    return ", ".join(map(str, sorted(set(lowest.values())))) or "0"


def _check(
    ordered: Mapping[str, list[float]], lowest: Mapping[str, int], most: Mapping[str, int]
) -> None:
    for name, values in ordered.items():
        if any(math.isnan(value) for value in values):
            raise ShapeError(f"{name} has a score that is NaN; scores must be numbers: {values}.")
        if not 0 <= lowest[name] <= most[name]:
            raise ShapeError(
                f"{name} can have between 0 and {most[name]} ranks, but min_rank={lowest[name]} was "
                "asked for; lower min_rank, or measure more components."
            )
