"""Sharing a budget of ranks among the targets, by what a calibration measured."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from torch import Tensor

from ..calibration import CalibrationResult
from ..linalg import allocate_ranks
from .config import GradInitConfig
from .experts import mean_scores
from .target import Target


def offered_rank(target: Target, config: GradInitConfig) -> int:
    """The largest rank that a target may get; the calibration measures that many triplets."""
    if not config.allocates_ranks or target.shape is None:
        return target.r
    highest = math.ceil(config.rho * target.requested_r)
    if config.max_rank is not None:
        highest = min(highest, config.max_rank)
    return max(target.r, min(highest, config.needs().rank_limit(target.shape)))


def allocated(
    targets: Mapping[str, Target], result: CalibrationResult, config: GradInitConfig
) -> dict[str, Target]:
    """The targets with their budget shared out anew; rank 0 means no adapter.

    Targets that could not be measured keep their rank. All experts of a parameter have the same
    rank. It counts once in a sum of ranks, and its score is the mean of the experts' scores.
    """
    if not config.allocates_ranks:
        return dict(targets)
    scores: dict[str, list[Tensor]] = {}
    for name, readouts in result.readouts.items():
        energy, by = result.energy[name], config.rank_allocation
        values = config.needs().scores(readouts, energy, by)[: offered_rank(targets[name], config)]
        scores.setdefault(targets[name].adapted, []).append(values)
    costs = _costs(targets.values(), config)
    asked = {t.adapted: t.r for t in targets.values()}
    ranks = allocate_ranks(
        {name: mean_scores(of_experts) for name, of_experts in scores.items()},
        _budget({name: asked[name] * costs[name] for name in scores}, config),
        costs=costs,
        min_rank=config.min_rank,
        max_rank=config.max_rank,
    )
    return {n: _with_rank(t, ranks.get(t.adapted, t.r), config) for n, t in targets.items()}


def _costs(targets: Iterable[Target], config: GradInitConfig) -> dict[str, int]:
    """What one rank of a layer, or of all experts of a parameter, takes of the budget."""
    costs: dict[str, int] = {}
    for target in targets:
        if config.budget == "ranks" or target.shape is None:
            costs[target.adapted] = 1
        else:
            costs[target.adapted] = costs.get(target.adapted, 0) + sum(target.shape)
    return costs


def _budget(asked: Mapping[str, int], config: GradInitConfig) -> int:
    """What the config asks for, or what it would use without an allocation."""
    return sum(asked.values()) if isinstance(config.budget, str) else config.budget


def without_empty(config: GradInitConfig, targets: Mapping[str, Target]) -> None:
    """Exclude targets of rank 0 from the injection, by new options in `config`."""
    # `exclude_modules` does not exclude parameters.
    if any(t.expert is not None and t.r == 0 for t in targets.values()):
        kept = {t.adapted for t in targets.values() if t.expert is not None and t.r}
        config.target_parameters = sorted(kept)
    empty = [t.name for t in targets.values() if t.expert is None and t.r == 0]
    if not empty:
        return
    old = config.exclude_modules or []
    # One regular expression matches full names. In a list, "0" would exclude "1.0" as well.
    if isinstance(old, str):
        kept = [f"(?:{old})"]
    else:
        kept = [rf"(?:.*\.)?{re.escape(name)}" for name in sorted(old)]
    config.exclude_modules = "|".join([*kept, *(re.escape(name) for name in empty)])


def _with_rank(target: Target, r: int, config: GradInitConfig) -> Target:
    if r == target.r:
        return target
    alpha = target.alpha * config.allocated_alpha(r / target.r)
    return dataclasses.replace(target, r=r, alpha=alpha)
