"""Which runs a study still needs: a search for every method's learning rate, then seeds.

Pure functions of the results so far, so a study that was interrupted goes on where it was.
"""

import math
from collections.abc import Mapping
from itertools import pairwise

TOLERANCE = 0.02
"""Rates whose loss is within 2 % of the best are the usable range."""
MAX_STEPS_FROM_FIRST = 4

Losses = Mapping[float, float]
"""Final test loss by learning rate; infinite where a run diverged."""


def rate(first: float, quarters: int) -> float:
    """A rate of the grid, some quarters of a decade from the first.

    The grid is 1, 1.8, 3.2 and 5.6 times powers of ten, so a rate is the same whatever way led to it.
    """
    return float(f"{10 ** ((round(4 * math.log10(first)) + quarters) / 4):.2g}")


def next_rates(first: float, losses: Losses) -> list[float]:
    """Rates to try next; empty when the search is over.

    The grid is widened by half decades until both of its ends are worse than the best by more than the
    tolerance, and then refined by quarters of a decade next to the best.

    Args:
        first: where the search begins.
        losses: what was found.
    """
    coarse = [rate(first, 2 * k) for k in (-1, 0, 1)]
    missing = [lr for lr in coarse if lr not in losses]
    if missing:
        return missing
    tried = [
        k
        for k in range(-MAX_STEPS_FROM_FIRST, MAX_STEPS_FROM_FIRST + 1)
        if rate(first, 2 * k) in losses
    ]
    bound, least = min(losses.values()) * (1 + TOLERANCE), best_rate(losses)
    wider = []
    for end, beyond in ((tried[0], tried[0] - 1), (tried[-1], tried[-1] + 1)):
        at_end = rate(first, 2 * end)
        is_beyond = (least - at_end) * (beyond - end) > 0  # of an earlier run
        if (losses[at_end] <= bound or is_beyond) and abs(beyond) <= MAX_STEPS_FROM_FIRST:
            wider.append(rate(first, 2 * beyond))
    if wider:
        return wider
    best = min(tried, key=lambda k: losses[rate(first, 2 * k)])
    between = [2 * best + side for side in (-1, 1) if best + side in tried]
    return [lr for lr in (rate(first, quarters) for quarters in between) if lr not in losses]


def neighbouring_rates(first: float, losses: Losses) -> list[float]:
    """Rates to try next from one that is almost right; empty when the best has both neighbours.

    Args:
        first: a rate of the grid, where the search begins.
        losses: what was found.
    """
    if first not in losses:
        return [first]
    best = best_rate(losses)
    return [lr for lr in (rate(best, -1), rate(best, 1)) if lr not in losses]


def best_rate(losses: Losses) -> float:
    """The rate with the least loss."""
    return min(losses, key=lambda lr: losses[lr])


def usable_range(losses: Losses, tolerance: float = TOLERANCE) -> tuple[float, float]:
    """The rates around the best whose loss is within a tolerance of the best.

    Crossings between two rates of the grid are interpolated, linearly in the loss and in the logarithm of
    the rate; next to a run that diverged the range ends at the last rate that did not.

    Args:
        losses: of a search that is over.
        tolerance: relative.

    Returns:
        Lowest and highest rate.
    """
    rates = sorted(losses)
    bound = losses[best_rate(losses)] * (1 + tolerance)
    middle = rates.index(best_rate(losses))
    low = _crossing(rates[middle::-1], losses, bound)
    return low, _crossing(rates[middle:], losses, bound)


def _crossing(rates: list[float], losses: Losses, bound: float) -> float:
    for inside, outside in pairwise(rates):
        if losses[outside] > bound:
            if math.isinf(losses[outside]):
                return inside
            share = (bound - losses[inside]) / (losses[outside] - losses[inside])
            return inside * (outside / inside) ** share
    return rates[-1]


def steps_to(curve: list[list[float]], loss: float) -> float | None:
    """When a curve first falls to a loss, between two evaluations linearly.

    Args:
        curve: `[step, loss, …]` in order.
        loss: the aim.

    Returns:
        Steps, or nothing if it never does.
    """
    if curve[0][1] <= loss:
        return 0.0
    for (step, above, *_), (later, below, *_) in pairwise(curve):
        if below <= loss:
            return step + (later - step) * (above - loss) / (above - below)
    return None
