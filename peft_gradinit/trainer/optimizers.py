"""What the callback does to the trainer's optimiser: act before it is made, and set rates."""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from torch import nn

from ..errors import ConfigError, warn
from ..layouts import processes
from ..records import LearningRate
from ..starts import base_hashes
from ..tuners import WAYS_AROUND

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import Trainer

SUGGESTED = "suggested"
"""The value of a rate that this package is to find."""
_FAR = 2.0
"""A rate this many times outside of the suggested range is warned of."""
_OWN_RATES = ("galore", "apollo", "schedulefree")
"""Kinds of Adam that want rates of their own: they train in a subspace, or average over steps."""


def is_like_adam(name: str) -> bool:
    """Whether an optimiser, by its name or its class's, takes the rates that Adam takes."""
    plain = name.lower().replace("_", "")
    return "adam" in plain and not any(kind in plain for kind in _OWN_RATES)


def before_optimizer(
    trainer: "Trainer", act: Callable[[], None], adjust: Callable[["Optimizer"], None]
) -> None:
    """Call `act` before the trainer makes its optimiser, and `adjust` with a new one."""
    create: Any = trainer.create_optimizer

    @functools.wraps(create)
    def create_optimizer(*args: Any, **kwargs: Any) -> Any:
        is_new = trainer.optimizer is None
        act()
        optimizer = create(*args, **kwargs)
        if is_new:
            adjust(optimizer)
        return optimizer

    trainer.create_optimizer = create_optimizer


def other_than_adam(trainer: "Trainer") -> str | None:
    """Name of the optimiser that the trainer will make if that is not one of Adam's kin."""
    chosen: Any = trainer.optimizer_cls_and_kwargs
    name = str(getattr(trainer.args.optim, "value", trainer.args.optim))
    if chosen is not None:
        kind = chosen[0]
        name = getattr(kind, "name", None) or getattr(kind, "__name__", type(kind).__name__)
    return None if is_like_adam(name) else name


def is_supervised(trainer: "Trainer") -> bool:
    """Whether the loss is one for which rates are suggested: TRL's others need far lower ones."""
    of_trl = {kind.__name__ for kind in type(trainer).__mro__ if kind.__module__.startswith("trl.")}
    return not of_trl or "SFTTrainer" in of_trl


def shards_before_optimizer(trainer: "Trainer") -> str | None:
    """Name of what shards the model before the trainer makes its optimiser; `None` if nothing."""
    if trainer.is_deepspeed_enabled:
        return "DeepSpeed"
    plugin: Any = trainer.accelerator.state.fsdp_plugin if trainer.is_fsdp_enabled else None
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        return "FSDP1"
    return None


@contextmanager
def whole_on_device(trainer: "Trainer", model: nn.Module) -> Iterator[None]:
    """Let a model that FSDP2 is to shard run before that: on the device of the batches.

    Raises:
        ConfigError: if not every process has the weights, as with `cpu_ram_efficient_loading`.
    """
    if not trainer.is_fsdp_enabled:
        yield
        return
    with processes(model) as world, world.together():
        hashes = world.gather(base_hashes(model))
        differing = sorted(
            n for n, value in hashes[0].items() if any(h[n] != value for h in hashes)
        )
        if differing:
            raise ConfigError(
                f"processes have other weights ({differing[0]}, …) before FSDP2 shards the model, "
                "as with cpu_ram_efficient_loading, so it cannot run there; load it whole on every "
                f"process, {WAYS_AROUND}."
            )
    device = next(model.parameters()).device
    model.to(trainer.accelerator.device)
    try:
        yield
    finally:
        model.to(device)


@dataclass(frozen=True)
class MadeAt:
    """The rates that an optimiser was made with.

    Attributes:
        rate: that of the trainer's arguments.
        of_groups: that of every group.
        n_own: how many groups, the last ones, have a rate that does not depend on the arguments'.
    """

    rate: float
    of_groups: list[float]
    n_own: int = 0


def check_takes_rate(made_at: MadeAt) -> None:
    """Refuse to set the rate of an optimiser that has one of its own.

    Raises:
        ConfigError: if no group of it has the rate of the trainer's arguments.
    """
    own = made_at.of_groups[: len(made_at.of_groups) - made_at.n_own]
    if not any(math.isclose(rate, made_at.rate) for rate in own):
        raise ConfigError(
            f"learning_rate={SUGGESTED!r} sets the rate of the trainer's arguments, but its optimiser has "
            f"one of its own ({', '.join(f'{rate:g}' for rate in sorted(set(own)))}), from optimizer_cls_and_kwargs or "
            "create_optimizer; choose the optimiser by args.optim, or leave the option out."
        )


def rescale_rates(trainer: "Trainer", rate: float, made_at: MadeAt) -> None:
    """Set the rate of an optimiser and a schedule that were made with another one.

    The ratios of the groups' rates to that of the arguments stay. Groups that have other rates by now have
    them from a checkpoint, and keep them.
    """
    groups: Any = cast("Any", trainer.optimizer).param_groups
    trainer.args.learning_rate = rate
    n_scaled = len(made_at.of_groups) - made_at.n_own
    factors = [1.0] * len(groups)
    for i, (group, made) in enumerate(zip(groups[:n_scaled], made_at.of_groups, strict=False)):
        if not math.isclose(group.get("initial_lr", group["lr"]), made):
            continue
        factors[i] = rate / made_at.rate
        for name in {"lr", "initial_lr"} & group.keys():
            group[name] = group[name] * factors[i]
    schedule: Any = trainer.lr_scheduler
    schedule = getattr(schedule, "scheduler", schedule)  # inside Accelerate's wrapper
    if hasattr(schedule, "base_lrs"):  # not one that waits for a plateau
        bases = zip(schedule.base_lrs, factors, strict=True)
        schedule.base_lrs = [base * factor for base, factor in bases]
        schedule._last_lr = [group["lr"] for group in groups]


def check_rate(trainer: "Trainer", suggested: LearningRate) -> None:
    """Warn of a rate far outside of the suggested range, for Adam and its kin."""
    groups = getattr(trainer.optimizer, "param_groups", ())
    rates = [group.get("initial_lr", group["lr"]) for group in groups]
    said = trainer.args.learning_rate
    rate = said if not rates or any(math.isclose(r, said) for r in rates) else rates[0]
    kind = type(getattr(trainer.optimizer, "optimizer", trainer.optimizer)).__name__
    near = suggested.low / _FAR <= rate <= suggested.high * _FAR
    if near or not rate or not is_like_adam(kind) or not is_supervised(trainer):
        return
    warn(
        f"the learning rate {rate:.1e} is far from the one suggested for this adapter, {suggested}; "
        "train at it with CalibrationCallback(trainer, learning_rate='suggested'), or set "
        "learning_rate in the arguments."
    )
