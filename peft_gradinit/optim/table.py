"""The table of optimisers: the one place that lists them, and how `Trainer` is given one.

What a table says of an optimiser stands at its class: `name`, `title`, `paper`.
"""

import dataclasses
from typing import Any

from ..errors import ConfigError
from .base import PairOptimizer
from .lora_muon import LoraMuon
from .lora_one import LoraOne
from .lora_pro import LoraPro
from .lora_rite import LoraRite
from .options import check_options, nearest, options_of

OPTIMIZERS = (LoraMuon, LoraRite, LoraOne, LoraPro)


@dataclasses.dataclass(frozen=True)
class Factory:
    """What `Trainer` calls without arguments to get that which makes an optimiser from a model."""

    name: str

    def __call__(self) -> type[PairOptimizer]:
        """The class of the optimiser."""
        return _class_of(self.name)


def optimizer(name: str, **options: Any) -> tuple[Factory, dict[str, Any]]:
    """What `Trainer(optimizer_cls_and_kwargs=...)` takes.

    Where a trainer lacks that argument, as TRL's for DPO, KTO and GRPO do, set its attribute of that name before
    it trains. `Trainer` makes the optimiser from its model. The rates are the ones given here:
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
    check_options(name, options, options_of(_class_of(name)))
    if options.get("lr") is None:
        raise ConfigError(
            f"{name} needs a rate; pass lr, such as what suggest_learning_rate(model, "
            f"optimizer={name!r}) gives."
        )
    return Factory(name), options


def _class_of(name: str) -> type[PairOptimizer]:
    by_name = {kind.name: kind for kind in OPTIMIZERS}
    if name not in by_name:
        raise ConfigError(
            f"there is no optimiser {name!r}{nearest(name, by_name)}; there are {list(by_name)}."
        )
    return by_name[name]
