"""Options of the optimisers: those of all, and what they may be."""

import difflib
import inspect
import math
from collections.abc import Iterable, Sequence
from typing import Any, TypedDict, get_args

from ..errors import ConfigError
from ..numbers import is_finite_number


class _Rate(TypedDict):
    lr: float


class Common(_Rate, total=False):
    """Options of every optimiser here.

    Attributes:
        lr: rate of the pairs, in the units of the method.
        head_lr: rate of AdamW for what is in no pair; needed if there are such parameters.
        weight_decay: decoupled decay of the pairs; towards zero factors, also where a start has
            put an anchor beside them.
        head_weight_decay: AdamW's decay of matrices in no pair; vectors have none.
        adapter_name: which adapter, or a list of those that train together.
    """

    head_lr: float | None
    weight_decay: float
    head_weight_decay: float
    adapter_name: str | Sequence[str]


def options_of(kind: type) -> set[str]:
    """The names that the class of an optimiser takes besides the model."""
    parameters = inspect.signature(kind).parameters.values()
    own = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return own | set(Common.__annotations__)


def check_options(optimizer: str, options: Iterable[str], known: set[str]) -> None:
    """Check names of options.

    Raises:
        ConfigError: if one is not known, with the nearest that is.
    """
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{optimizer} has no option {option!r}{nearest(option, known)}; it has "
                f"{sorted(known)}."
            )


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint at the known name that is most like one that is not."""
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def check_flag(optimizer: str, **flags: Any) -> None:
    """Check options that are switches.

    Raises:
        ConfigError: if one is neither `True` nor `False`.
    """
    for option, value in flags.items():
        if not isinstance(value, bool):
            raise ConfigError(f"{optimizer}: {option} must be True or False, got {value!r}.")


def check_positive(optimizer: str, **numbers: Any) -> None:
    """Check rates and decays.

    Raises:
        ConfigError: if a number is negative or not finite.
    """
    for option, value in numbers.items():
        if not is_finite_number(value) or value < 0:
            raise ConfigError(
                f"{optimizer}: {option} must be a number of at least 0, got {value!r}."
            )


def check_fraction(optimizer: str, **numbers: Any) -> None:
    """Check dampenings and decays of moments.

    Raises:
        ConfigError: if a number is not in `[0, 1)`.
    """
    for option, value in numbers.items():
        if not is_finite_number(value) or not 0 <= value < 1:
            raise ConfigError(
                f"{optimizer}: {option} must be at least 0 and below 1, got {value!r}."
            )


def check_betas(optimizer: str, betas: Any) -> None:
    """Check the decays of two moments.

    Raises:
        ConfigError: if they are not two numbers in `[0, 1)`.
    """
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ConfigError(f"{optimizer}: betas must be two numbers, got {betas!r}.")
    check_fraction(optimizer, **{"betas[0]": betas[0], "betas[1]": betas[1]})


def check_choice(optimizer: str, option: str, value: Any, choices: Any) -> None:
    """Check an option that is one of some words, given as a `Literal`.

    Raises:
        ConfigError: if it is another.
    """
    if value not in get_args(choices):
        raise ConfigError(
            f"{optimizer}: {option} must be one of {list(get_args(choices))}, got {value!r}."
        )


def defaults() -> dict[str, Any]:
    """What the options of all have that are not given."""
    return {
        "lr": math.nan,  # refused below
        "head_lr": None,
        "weight_decay": 0.0,
        "head_weight_decay": 0.0,
        "adapter_name": "default",
    }
