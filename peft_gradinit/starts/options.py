"""Options on where an adapter goes and how many ranks a layer gets, decided from a calibration."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal, TypeVar

from peft.utils.constants import INCLUDE_LINEAR_LAYERS_SHORTHAND

from ..calibration import Need
from ..errors import ConfigError
from ..numbers import is_finite_number, is_integer

AUTO, AUTO_WITH_OUTPUT = "auto", "auto+output"
"""Values of `target_modules`: the calibration chooses the layers, the output layer among them."""
TARGET_WORDS = (INCLUDE_LINEAR_LAYERS_SHORTHAND, AUTO, AUTO_WITH_OUTPUT)
"""Values of `target_modules` that are neither names nor a regular expression."""
ConfigT = TypeVar("ConfigT")
RankAllocation = Literal["uniform", "explained_variance", "gradient_energy"]
_ALLOCATIONS = ("uniform", "explained_variance", "gradient_energy")
_UNSET: Any = None
"""Default of options whose value depends on others; `resolve_allocation` sets them."""
_USUAL = {"rank_allocation": "uniform", "budget": "ranks", "rho": 2.0, "min_rank": 1}
_OF_AUTO = {"budget": "parameters", "rho": 4.0, "min_rank": 0}


def is_automatic(targets: Any) -> bool:
    """Whether the calibration chooses the layers."""
    return targets in (AUTO, AUTO_WITH_OUTPUT)


def check_choosable(targets: Any, need: Need, config: str) -> None:
    """Refuse automatic targets if the method measures nothing that layers can be chosen by.

    Raises:
        ConfigError: if so.
    """
    if is_automatic(targets) and len(need.allocations) == 1:
        raise ConfigError(
            f"{config} measures {need.title}, by which no layers can be chosen; name them in "
            f"target_modules, or 'all-linear', in place of {targets!r}."
        )


class PaperSettings:
    """A config that knows the options of its paper's experiments."""

    paper_values: ClassVar[Mapping[str, Any]] = {}
    """Options that the experiments have, but for data and targets."""

    @classmethod
    def as_in_paper(cls: type[ConfigT], **options: Any) -> ConfigT:
        """The config with the options of the paper's experiments.

        Args:
            options: of the config; they win over the paper's.
        """
        return cls(**{**cls.paper_values, **options})  # pyright: ignore[reportAttributeAccessIssue]


@dataclasses.dataclass
class AllocationOptions:
    """The options of an allocation of ranks; see `GradInitConfig`."""

    automatic: ClassVar[bool] = False
    """Whether the targets were `"auto"` or `"auto+output"`, which PEFT replaces by names."""
    added: ClassVar[frozenset[str]] = frozenset()
    """Names of the layers that `"auto+output"` added to `"all-linear"`, once it is injected."""

    usual: ClassVar[Mapping[str, Any]] = _USUAL
    """Values of options that are not given, without automatic targets."""

    rank_allocation: RankAllocation = dataclasses.field(
        default=_UNSET, metadata={"help": f"How layers share their ranks: {_ALLOCATIONS}."}
    )
    budget: Literal["ranks", "parameters"] | int | float = dataclasses.field(
        default=_UNSET,
        metadata={
            "help": "What an allocation keeps: 'ranks', 'parameters', or a number of these, or a "
            "share of the model's."
        },
    )
    rho: float = dataclasses.field(default=_UNSET, metadata={"help": "The largest rank over r."})
    min_rank: int = dataclasses.field(
        default=_UNSET, metadata={"help": "The least rank of a layer."}
    )
    max_rank: int | None = dataclasses.field(
        default=None, metadata={"help": "The largest rank of a layer."}
    )

    def resolve_allocation(self, targets: Any, need: Need) -> None:
        """Set the options that are not given, and note whether the targets are automatic.

        Args:
            targets: what the user gave as `target_modules`.
            need: what the method measures.

        Raises:
            ConfigError: if the targets are automatic and the method measures nothing that layers
                can be chosen by.
        """
        check_choosable(targets, need, type(self).__name__)
        values = dict(self.usual)
        if is_automatic(targets):
            vars(self)["automatic"] = True
            values |= {"rank_allocation": need.allocations[-1], **_OF_AUTO}
        for name, value in values.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def check_allocation(self, r: int, rank_pattern: Mapping[str, int], need: Need) -> None:
        """Refuse options that no allocation can keep.

        Raises:
            ConfigError: if one has a value that cannot work, or excludes another.
        """
        name, allocation = type(self).__name__, self.rank_allocation
        if allocation not in _ALLOCATIONS:
            raise ConfigError(
                f"{name}: rank_allocation must be one of {_ALLOCATIONS}, got {allocation!r}."
            )
        if not is_finite_number(self.rho) or self.rho < 1:
            raise ConfigError(f"{name}: rho must be a number of at least 1, got {self.rho!r}.")
        self._check_limits(name, r, rank_pattern)
        self._check_budget(name, need)
        if allocation not in need.allocations:
            raise ConfigError(
                f"{name} measures {need.title}, which serves rank_allocation in "
                f"{need.allocations}, got {allocation!r}."
            )

    def _check_budget(self, name: str, need: Need) -> None:
        """Refuse a budget that is no budget, or that nothing shares out."""
        budget = self.budget
        if budget not in ("ranks", "parameters") and not _is_amount(budget):
            raise ConfigError(
                f"{name}: budget must be 'ranks', 'parameters', a whole number of trained numbers of at "
                f"least 1, or a share of the model's numbers between 0 and 1, got {budget!r}."
            )
        if budget != "ranks" and self.rank_allocation == "uniform":
            possible = need.allocations[1:]
            choice = f"set rank_allocation to one of {possible}, or " if possible else ""
            raise ConfigError(
                f"{name}: budget={budget!r} is for an allocation, but rank_allocation is "
                f"'uniform', which keeps the ranks; {choice}leave budget out."
            )

    def _check_limits(self, name: str, r: int, rank_pattern: Mapping[str, int]) -> None:
        """Refuse a `min_rank` or `max_rank` that contradicts the ranks asked for."""
        highest = self.max_rank
        if not is_integer(self.min_rank) or not 0 <= self.min_rank <= r:
            raise ConfigError(
                f"{name}: min_rank must be between 0 and r={r}, got {self.min_rank!r}."
            )
        if highest is None:
            return
        if not is_integer(highest) or highest < r:
            raise ConfigError(
                f"{name}: max_rank must be an integer of at least r={r}, got {highest!r}."
            )
        for pattern, rank in rank_pattern.items():
            if rank > highest:
                raise ConfigError(
                    f"{name}: rank_pattern[{pattern!r}] must be at most max_rank={highest}, got "
                    f"{rank}; raise max_rank, or lower the pattern."
                )


def _is_amount(budget: Any) -> bool:
    """Whether a budget is a number of trained numbers, or a share."""
    if is_integer(budget) or (is_finite_number(budget) and float(budget).is_integer()):
        return budget >= 1
    return is_finite_number(budget) and 0 < budget < 1
