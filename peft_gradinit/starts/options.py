"""Options on where an adapter goes and how many ranks a layer gets, decided from a calibration."""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

from ..calibration import Need
from ..errors import ConfigError
from ..numbers import is_finite_number, is_integer

AUTO, AUTO_WITH_OUTPUT = "auto", "auto+output"
"""Values of `target_modules`: the calibration chooses the layers, the output layer among them."""
RankAllocation = Literal["uniform", "explained_variance", "gradient_energy"]
_ALLOCATIONS = ("uniform", "explained_variance", "gradient_energy")
_OF_AUTO = {"budget": "parameters", "rho": 4.0, "min_rank": 0}
"""Values that `target_modules="auto"` gives to options that have their defaults."""


@dataclasses.dataclass
class AllocationOptions:
    """The options of an allocation of ranks; see `GradInitConfig`."""

    automatic: ClassVar[bool] = False
    """Whether the targets were `"auto"` or `"auto+output"`, which PEFT replaces by names."""
    added: ClassVar[frozenset[str]] = frozenset()
    """Names of the layers that `"auto+output"` added to `"all-linear"`, once it is injected."""

    rank_allocation: RankAllocation = dataclasses.field(
        default="uniform", metadata={"help": f"How layers share their ranks: {_ALLOCATIONS}."}
    )
    budget: Literal["ranks", "parameters"] | int | float = dataclasses.field(
        default="ranks",
        metadata={
            "help": "What an allocation keeps: 'ranks', 'parameters', or a number of these, or a "
            "share of the model's."
        },
    )
    rho: float = dataclasses.field(default=2.0, metadata={"help": "The largest rank over r."})
    min_rank: int = dataclasses.field(default=1, metadata={"help": "The least rank of a layer."})
    max_rank: int | None = dataclasses.field(
        default=None, metadata={"help": "The largest rank of a layer."}
    )

    def choose_automatically(self, word: str, need: Need) -> None:
        """Note that the targets are automatic, and set what that implies.

        Args:
            word: what the user gave as `target_modules`.
            need: what the method measures.

        Raises:
            ConfigError: if the method measures nothing that layers can be chosen by.
        """
        if len(need.allocations) == 1:
            raise ConfigError(
                f"{type(self).__name__} measures {need.title}, by which no layers can be chosen; "
                f"name them in target_modules, or 'all-linear', in place of {word!r}."
            )
        vars(self)["automatic"] = True
        if self.rank_allocation == "uniform":
            self.rank_allocation = need.allocations[-1]  # pyright: ignore[reportAttributeAccessIssue]
        defaults = {f.name: f.default for f in dataclasses.fields(self)}
        for name, value in _OF_AUTO.items():
            if getattr(self, name) == defaults[name]:
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
                f"{name}: budget must be 'ranks', 'parameters', a number of trained numbers of at "
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
    if is_integer(budget):
        return budget >= 1
    return is_finite_number(budget) and 0 < budget < 1
