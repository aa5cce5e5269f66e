"""Sharing a budget of ranks among the targets, by what a calibration measured."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..calibration import CalibrationResult
from ..errors import ConfigError
from ..linalg import allocate_ranks, total_cost
from .base import n_parameters
from .config import GradInitConfig
from .experts import scores_of_all
from .target import Target


def offered_rank(target: Target, config: GradInitConfig) -> int:
    """The largest rank that a target may get; the calibration measures that many triplets."""
    if not config.allocates_ranks or target.shape is None:
        return target.r
    highest = math.ceil(config.rho * (target.requested_r or target.r))
    if config.max_rank is not None:
        highest = min(highest, config.max_rank)
    offered = max(target.r, min(highest, config.needs().rank_limit(target.shape)))
    return min(offered, *target.shape)  # more would add nothing to the layer


def allocated(
    targets: Mapping[str, Target],
    result: CalibrationResult,
    config: GradInitConfig,
    model: nn.Module,
) -> dict[str, Target]:
    """The targets with their budget shared out anew; rank 0 means no adapter.

    All experts of a parameter have the same rank. In a sum of ranks it counts once, and its score
    is the mean of the experts' scores; in trained numbers every expert pays, and scores add up.
    Targets that could not be measured keep their rank; with automatic targets they get none. A
    budget may be a share of the size of `model`.

    Raises:
        ConfigError: if the budget is less than a rank of any layer.
        ShapeError: if it is less than `min_rank` takes, or more than the layers can have.
    """
    ranks, reasons = {}, {}
    if config.allocates_ranks:
        ranks, reasons = _shared_out(targets, result, config, model)
    if config.automatic:
        measured = {targets[name].adapted for name in result.readouts}
        unreached = {t.adapted for t in targets.values()} - measured
        ranks |= dict.fromkeys(unreached, 0)
    return {
        n: resized(t, ranks.get(t.adapted, t.r), config, reasons.get(t.adapted, ""))
        for n, t in targets.items()
    }


def _shared_out(
    targets: Mapping[str, Target],
    result: CalibrationResult,
    config: GradInitConfig,
    model: nn.Module,
) -> tuple[dict[str, int], dict[str, str]]:
    """The rank of everything measured, and why."""
    scores = _scores(targets, result, config)
    costs, once = _costs(targets.values(), config), _once(targets.values(), config)
    # What "auto+output" adds was not asked for.
    asked = {t.adapted: min(t.r, t.requested_r) for t in targets.values() if t.shape is not None}
    counted = {n: r for n, r in asked.items() if config.automatic or n in scores}
    most = {name: len(values) for name, values in scores.items()}
    if config.max_rank is not None:
        most = {name: min(config.max_rank, r) for name, r in most.items()}
    shapes = {t.adapted: t.shape for t in targets.values() if t.shape is not None}
    limits = {name: min(config.needs().rank_limit(shapes[name]), *shapes[name]) for name in scores}
    budget = _budget(total_cost(counted, costs, once), config, model)
    if isinstance(config.budget, str):  # layers that were not reached cannot use their part
        budget = min(budget, total_cost(most, costs, once))
    ranks = allocate_ranks(
        scores,
        budget,
        costs=costs,
        once=once,
        min_rank={name: min(config.min_rank, limit) for name, limit in limits.items()},
        max_rank=config.max_rank,
    )
    if scores and not any(ranks.values()):
        cheapest = min(costs[name] + once[name] for name in scores)
        raise ConfigError(
            f"budget={config.budget!r} is {budget} trained numbers, and a rank takes {cheapest} in "
            "the smallest layer; give a larger budget."
        )
    return ranks, _reasons(scores, ranks, costs, asked)


def resized(target: Target, r: int, config: GradInitConfig, reason: str = "") -> Target:
    """A target with another rank, its `lora_alpha` changed as the config says, and the reason."""
    reason = reason if r != target.requested_r else ""
    if r == target.r:
        return dataclasses.replace(target, reason=reason)
    alpha = target.alpha * config.allocated_alpha(r / target.r)
    return dataclasses.replace(target, r=r, alpha=alpha, reason=reason)


def _scores(
    targets: Mapping[str, Target], result: CalibrationResult, config: GradInitConfig
) -> dict[str, Tensor]:
    """The gain of each rank that a layer, or all experts of a parameter, may get."""
    scores: dict[str, list[Tensor]] = {}
    for name, readouts in result.readouts.items():
        energy, by = result.energy[name], config.rank_allocation
        values = config.needs().scores(readouts, energy, by)[: offered_rank(targets[name], config)]
        scores.setdefault(targets[name].adapted, []).append(values)
    each_counts = config.budget != "ranks"
    return {n: scores_of_all(of, each_counts=each_counts) for n, of in scores.items()}


def _costs(targets: Iterable[Target], config: GradInitConfig) -> dict[str, int]:
    """What one rank of a layer, or of all experts of a parameter, takes of the budget."""
    costs: dict[str, int] = {}
    for target in targets:
        if config.budget == "ranks" or target.shape is None:
            costs[target.adapted] = 1
        else:
            costs[target.adapted] = costs.get(target.adapted, 0) + sum(target.shape)
    return costs


def _once(targets: Iterable[Target], config: GradInitConfig) -> dict[str, int]:
    """What a layer takes of the budget besides its ranks: DoRA's magnitudes, biases of `B`."""
    n = 0 if config.budget == "ranks" else config.use_dora + config.lora_bias
    return {t.adapted: n * t.shape[0] if t.shape is not None else 0 for t in targets}


def _budget(asked: int, config: GradInitConfig, model: nn.Module) -> int:
    """What the config asks for, or what it would use without an allocation."""
    if isinstance(config.budget, str):
        return asked
    return int(config.budget * n_parameters(model) if config.budget < 1 else config.budget)


def _reasons(
    scores: Mapping[str, Tensor],
    ranks: Mapping[str, int],
    costs: Mapping[str, int],
    asked: Mapping[str, int],
) -> dict[str, str]:
    """Why each layer got its rank, for the report."""
    gains = {name: values[: ranks[name]].sum().item() for name, values in scores.items()}
    total, spent = sum(gains.values()), sum(ranks[name] * costs[name] for name in scores)
    least = min(
        (scores[n][r - 1].item() / costs[n] for n, r in ranks.items() if r), default=math.inf
    )
    reasons = {}
    for name, r in ranks.items():
        said = f"{asked[name]} asked for"
        if r:
            gained, paid = gains[name] / max(total, 1e-300), r * costs[name] / spent
            share = f"{gained:.1%} of the gain for {paid:.1%} of the budget"
            reasons[name] = f"r allocated, {said}: {share}"
        else:
            best = scores[name][0].item() / costs[name] / max(least, 1e-300)
            reasons[name] = f"no rank, {said}: its best gains {best:.0%} of the least that was kept"
    return reasons


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
        flags = re.match(r"\(\?([a-zA-Z]+)\)", old)  # Python takes them at the very beginning alone
        kept = [f"(?{flags[1]}:{old[flags.end() :]})" if flags else f"(?:{old})"]
    else:
        kept = [rf"(?:.*\.)?{re.escape(name)}" for name in sorted(old)]
    config.exclude_modules = "|".join([*kept, *(re.escape(name) for name in empty)])
