"""The config and the callback from what a framework knows of LoRA, and from options of ours."""

import dataclasses
import difflib
import inspect
from collections.abc import Iterable, Mapping, Sized
from typing import Any

from peft import PeftConfig

from ..calibration import DEFERRED
from ..errors import ConfigError
from ..methods import METHODS
from ..trainer import CalibrationCallback
from ..tuners import deferred_adapters

METHOD_CONFIGS: dict[str, Any] = {method.name: method for method in METHODS}
"""Config classes by the names that frameworks use for kinds of adapters."""

_OF_CALLBACK = frozenset(inspect.signature(CalibrationCallback).parameters) - {
    "trainer",
    "adapter_name",
}


def deferred_config(
    method: str, of_framework: Mapping[str, Any], options: Mapping[str, Any]
) -> PeftConfig:
    """Make a config whose start comes when training begins.

    Args:
        method: name of the method.
        of_framework: the framework's own options for LoRA; `None`, empty ones and defaults count as not given.
        options: further fields of the method's config, and options of `CalibrationCallback`.

    Returns:
        The config, deferred unless its start reads no data.

    Raises:
        ConfigError: if there is no such method, or the method has no such option.
    """
    kind = METHOD_CONFIGS.get(method)
    if kind is None:
        raise ConfigError(f"method must be one of {list(METHOD_CONFIGS)}, got {method!r}.")
    fields = {field.name for field in dataclasses.fields(kind) if field.init}
    _check_known(kind.__name__, options, fields | _OF_CALLBACK)
    default = kind()
    given = {n: value for n, value in of_framework.items() if _is_given(value, n, default)}
    # SVFit has no scaling, but frameworks always have a `lora_alpha`.
    if lost := sorted(given.keys() - fields - {"lora_alpha"}):
        raise ConfigError(f"{kind.__name__} has no {', '.join(lost)}; leave it out.")
    values = {name: value for name, value in {**given, **options}.items() if name in fields}
    if kind.needed() != "nothing":
        values["calibration"] = DEFERRED
    return kind(**values)


def callback_of(trainer: Any, options: Mapping[str, Any]) -> CalibrationCallback | None:
    """Make the callback that a trainer's adapter needs.

    Args:
        trainer: with its model.
        options: as for `deferred_config`; those of the callback count.

    Returns:
        The callback; `None` if every adapter has its start and no learning rate is asked for.
    """
    model = trainer.accelerator.unwrap_model(trainer.model)
    own = {name: value for name, value in options.items() if name in _OF_CALLBACK}
    sets_rates = "learning_rate" in own or "head_learning_rate" in own
    if not sets_rates and not deferred_adapters(model):
        return None
    return CalibrationCallback(trainer, **own)


def _is_given(value: Any, name: str, default: PeftConfig) -> bool:
    """Whether a framework's value says something: 0 and `False` do, where the default is another."""
    if value is None or (isinstance(value, Sized) and not len(value)):
        return False
    return bool(value) or value != getattr(default, name, value)


def _check_known(name: str, options: Mapping[str, Any], known: Iterable[str]) -> None:
    known = set(known)
    for option in options:
        if option not in known:
            near = difflib.get_close_matches(option, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ConfigError(f"neither {name} nor CalibrationCallback has {option!r}{hint}")
