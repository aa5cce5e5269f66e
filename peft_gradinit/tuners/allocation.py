"""Ranks shared by a budget: who gets how many, from what a calibration measured."""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Literal

from torch import Tensor

from ..calibration import CalibrationResult
from ..errors import ConfigError
from ..linalg import allocate_ranks
from .numbers import is_finite_number, is_integer
from .parameters import mean_scores
from .targets import Target

if TYPE_CHECKING:
    from .config import GradInitConfig

RankAllocation = Literal["uniform", "explained_variance", "gradient_energy"]
ALLOCATIONS = ("uniform", "explained_variance", "gradient_energy")


def check_allocation(config: "GradInitConfig") -> None:
    """Refuse options of an allocation that cannot work together.

    Args:
        config: whatever the user set.

    Raises:
        ConfigError: naming the option.
    """
    name, allocation = type(config).__name__, config.rank_allocation
    if allocation not in ALLOCATIONS:
        raise ConfigError(
            f"{name}: rank_allocation must be one of {ALLOCATIONS}, got {allocation!r}."
        )
    if not is_finite_number(config.rho) or config.rho < 1:
        raise ConfigError(f"{name}: rho must be a number of at least 1, got {config.rho!r}.")
    _check_limits(name, config)
    if allocation == "gradient_energy" and config.statistic != "gradient":
        raise ConfigError(
            f"{name} measures {config.statistic}, not gradients; use "
            "rank_allocation='explained_variance'."
        )
    if config.allocates_ranks and config.is_deferred and not config.restored:
        raise ConfigError(
            f"{name}: rank_allocation={allocation!r} decides shapes from data, which a deferred "
            "adapter does not have yet, and an optimiser (of Trainer, of TRL) is built on shapes; "
            "calibrate first, calibrate(model, config, data).save(path) with this config and "
            "calibration=path or data, or keep the ranks with rank_allocation='uniform' or rho=1."
        )


def _check_limits(name: str, config: "GradInitConfig") -> None:
    """Refuse limits that the ranks asked for do not keep.

    Args:
        name: of the config's class.
        config: with ranks that were checked.

    Raises:
        ConfigError: naming the limit, or the pattern that exceeds it.
    """
    highest = config.max_rank
    if not is_integer(config.min_rank) or not 0 <= config.min_rank <= config.r:
        raise ConfigError(
            f"{name}: min_rank must be between 0 and r={config.r}, got {config.min_rank!r}."
        )
    if highest is None:
        return
    if not is_integer(highest) or highest < config.r:
        raise ConfigError(
            f"{name}: max_rank must be an integer of at least r={config.r}, got {highest!r}."
        )
    for pattern, r in (config.rank_pattern or {}).items():
        if r > highest:
            raise ConfigError(
                f"{name}: rank_pattern[{pattern!r}] must be at most max_rank={highest}, got {r}; "
                "raise max_rank, or lower the pattern."
            )


def offered_rank(target: Target, config: "GradInitConfig") -> int:
    """The largest rank that a target may get, which is what has to be measured."""
    if not config.allocates_ranks or config.restored or target.shape is None:
        return target.r
    highest = math.ceil(config.rho * target.requested_r)
    if config.max_rank is not None:
        highest = min(highest, config.max_rank)
    return max(target.r, min(highest, config.rank_limit(target.shape)))


def allocated(
    targets: Mapping[str, Target], result: CalibrationResult, config: "GradInitConfig"
) -> dict[str, Target]:
    """Share the sum of the targets' ranks among them.

    Targets that could not be measured keep their rank. The experts of a parameter have one rank, which
    counts once, and whose score is the mean of what it brings to each.

    Args:
        targets: with the ranks that the config asks for.
        result: what was measured.
        config: `rank_allocation` and its limits.

    Returns:
        The targets with their new ranks and what the method makes of their `lora_alpha`; rank 0 for
        those that lose their adapter.
    """
    if not config.allocates_ranks:
        return dict(targets)
    scores: dict[str, list[Tensor]] = {}
    for name, svd in result.triplets.items():
        values = config.rank_scores(svd)[: offered_rank(targets[name], config)]
        whole = config.rank_allocation == "gradient_energy"
        share = values if whole else values / max(result.energy[name], 1e-300)
        scores.setdefault(targets[name].adapted, []).append(share)
    asked = {t.adapted: t.r for t in targets.values()}
    ranks = allocate_ranks(
        {name: mean_scores(of_experts) for name, of_experts in scores.items()},
        sum(asked[name] for name in scores),
        min_rank=config.min_rank,
        max_rank=config.max_rank,
    )
    return {n: _with_rank(t, ranks.get(t.adapted, t.r), config) for n, t in targets.items()}


def without_empty(config: "GradInitConfig", targets: Mapping[str, Target]) -> None:
    """Exclude targets of rank 0 from the injection.

    Args:
        config: gets a new `exclude_modules`, and other `target_parameters`, which those do not exclude.
        targets: all targets.
    """
    if any(t.expert is not None and t.r == 0 for t in targets.values()):
        kept = {t.adapted for t in targets.values() if t.expert is not None and t.r}
        config.target_parameters = sorted(kept)
    empty = [t.name for t in targets.values() if t.expert is None and t.r == 0]
    if not empty:
        return
    old = config.exclude_modules or []
    # One regular expression, which matches full names: in a list, "0" would exclude "1.0" as well.
    if isinstance(old, str):
        kept = [f"(?:{old})"]
    else:
        kept = [rf"(?:.*\.)?{re.escape(name)}" for name in sorted(old)]
    config.exclude_modules = "|".join([*kept, *(re.escape(name) for name in empty)])


def _with_rank(target: Target, r: int, config: "GradInitConfig") -> Target:
    if r == target.r:
        return target
    return dataclasses.replace(
        target, r=r, alpha=target.alpha * config.allocated_alpha(r / target.r)
    )
