"""The table of optimisers: the one place that lists them, and how `Trainer` is given one.

What a table says of an optimiser stands at its class: `name`, `title`, `paper`.
"""

import dataclasses
import difflib
import inspect
from typing import Any

from ..errors import ConfigError
from .base import Common, PairOptimizer
from .lora_muon import LoraMuon
from .lora_one import LoraOne
from .lora_pro import LoraPro
from .lora_rite import LoraRite

OPTIMIZERS = (LoraMuon, LoraRite, LoraOne, LoraPro)


@dataclasses.dataclass(frozen=True)
class Factory:
    """What `Trainer` calls without arguments to get that which makes an optimiser from a model."""

    name: str

    def __call__(self) -> type[PairOptimizer]:
        """The class of the optimiser."""
        return _class_of(self.name)


def optimizer(name: str, **options: Any) -> tuple[Factory, dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` of Transformers and TRL takes.

    `Trainer` makes the optimiser from its model. The rates are the ones given here:
    `TrainingArguments.learning_rate`, `weight_decay` and `optim` are not read. Schedules, clipping,
    accumulation and checkpoints work as with any optimiser.

    Args:
        name: `"lora_muon"`, `"lora_rite"`, `"lora_one"` or `"lora_pro"`.
        **options: `lr`, and other options of the class.

    Returns:
        The pair.

    Raises:
        ConfigError: if there is no such optimiser or option, or `lr` is missing.
    """
    known = _options(_class_of(name))
    for option in options:
        if option not in known:
            raise ConfigError(
                f"{name} has no option {option!r}{_near(option, known)}; it has {sorted(known)}."
            )
    if "lr" not in options:
        raise ConfigError(f"{name} needs a rate; pass lr, as in optimizer({name!r}, lr=0.03).")
    return Factory(name), options


def _class_of(name: str) -> type[PairOptimizer]:
    by_name = {kind.name: kind for kind in OPTIMIZERS}
    if name not in by_name:
        raise ConfigError(
            f"there is no optimiser {name!r}{_near(name, by_name)}; there are {list(by_name)}."
        )
    return by_name[name]


def _options(kind: type[PairOptimizer]) -> set[str]:
    parameters = inspect.signature(kind).parameters.values()
    own = {p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}
    return own | set(Common.__annotations__)


def _near(name: str, known: Any) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
