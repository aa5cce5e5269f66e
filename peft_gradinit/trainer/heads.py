"""Heads that are trained in full beside the adapter: a learning rate of their own, and which one."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from ..errors import ConfigError, DataError
from ..linalg import rate_of_new_layer
from ..numbers import is_finite_number
from .optimizers import SUGGESTED, is_supervised, other_than_adam
from .understudy import (
    TrainingBatches,
    as_in_training,
    bookkeeping,
    loss_in_training,
    understudy_of,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import Trainer

_N_BATCHES = 4
"""Batches that a head's inputs are measured on; their mean size differs little from row to row."""

_NO_HEADS = (
    "head_learning_rate={rate} is for modules that are trained in full, but the optimiser has none; "
    "name them in modules_to_save, or leave head_learning_rate out."
)


def check_head_rate(trainer: "Trainer", rate: object) -> None:
    """Refuse a rate for heads that is none, or that cannot be found in this training.

    Raises:
        ConfigError: if it is such a rate.
    """
    if rate is None or (is_finite_number(rate) and rate > 0):
        return
    if rate != SUGGESTED:
        raise ConfigError(
            f"head_learning_rate must be a positive number or {SUGGESTED!r}, got {rate!r}."
        )
    asked = f"head_learning_rate={SUGGESTED!r}"
    if not is_supervised(trainer):
        raise ConfigError(
            f"{asked} is for supervised training, not for {type(trainer).__name__}; give a number."
        )
    if trainer.is_fsdp_enabled:
        raise ConfigError(
            f"{asked} runs the model before the optimiser is made, and FSDP shards it; give a number, "
            "found on one device."
        )
    if kind := other_than_adam(trainer):
        raise ConfigError(
            f"{asked} is for Adam and its kin, but the trainer makes {kind}; give a number (head_lr of "
            "optimisers of pairs)."
        )


def give_heads_a_rate(optimizer: "Optimizer", model: nn.Module, rate: float) -> int:
    """Move the modules that are trained in full into groups of their own, with this rate.

    Returns:
        How many groups there are of them, at the end of the optimiser's.

    Raises:
        ConfigError: if there are none.
    """
    heads = {id(p) for _, m in _wrappers(model) for p in m.parameters() if p.requires_grad}
    moved = []
    for group in optimizer.param_groups:
        if of_heads := [p for p in group["params"] if id(p) in heads]:
            group["params"] = [p for p in group["params"] if id(p) not in heads]
            moved.append({**group, "params": of_heads, "lr": rate})
    if not moved:
        raise ConfigError(_NO_HEADS.format(rate=rate))
    for group in moved:
        optimizer.add_param_group(group)
    return len(moved)


def suggested_head_rate(trainer: "Trainer", model: nn.Module, seed: int) -> float:
    """The rate for the heads, from the sizes of their inputs, and not below that of the adapter.

    Args:
        trainer: whose first batches and loss are used, by an understudy. Its arguments have the
            adapter's rate.
        model: the trainer's model.
        seed: of the order of the batches.

    Raises:
        ConfigError: if something else than linear layers is trained in full, or nothing; or if a
            trainer reads the heads' weights and never runs them.
        DataError: if no input of a head takes part in the loss.
    """
    layers, ran = _linear_layers(model), False
    with bookkeeping(trainer.accelerator), as_in_training(model, seed), _calls(layers) as calls:
        understudy = understudy_of(trainer)
        sizes: list[list[Tensor]] = [[] for _ in layers]
        for batch in itertools.islice(TrainingBatches(understudy), _N_BATCHES):
            calls.clear()
            with torch.enable_grad():
                loss = loss_in_training(understudy, model, batch)
            ran = ran or bool(calls)
            for i, found in _sizes_in_loss(loss, calls):
                sizes[i].append(found)
    return max(trainer.args.learning_rate, _lowest_rate(trainer, sizes, ran))


def _lowest_rate(trainer: "Trainer", sizes: list[list[Tensor]], ran: bool) -> float:
    """The lowest rate of the layers, which ran or did not, over all processes."""
    accelerator: Any = trainer.accelerator
    rates = []
    for of_layer in sizes:
        known = torch.cat(of_layer) if of_layer else torch.zeros(0, device=accelerator.device)
        total = torch.stack([known.sum(), known.new_tensor(float(len(known)))])
        summed, n_rows = accelerator.reduce(total, reduction="sum").tolist()
        if n_rows and summed:
            rates.append(rate_of_new_layer(summed / n_rows))
    if not rates and not ran:
        raise ConfigError(
            f"head_learning_rate={SUGGESTED!r} looks at the inputs of the modules that are trained in "
            f"full, but {type(trainer).__name__} computes its loss from their weights, without running "
            "them; give a number."
        )
    if not rates:
        raise DataError(
            f"head_learning_rate={SUGGESTED!r}: no input of a head takes part in the loss of the "
            f"first {_N_BATCHES} batches, or all of them are zero; look at the labels, or give a number."
        )
    return min(rates)


def _sizes_in_loss(
    loss: Tensor, calls: list[tuple[int, Tensor, Tensor]]
) -> Iterator[tuple[int, Tensor]]:
    """Sizes of the inputs whose outputs the loss depends on: not of padding, say."""
    outputs = [output for _, _, output in calls]
    gradients = torch.autograd.grad(loss, outputs, allow_unused=True) if outputs else []
    for (i, inputs, _), gradient in zip(calls, gradients, strict=True):
        if gradient is not None:
            counts = gradient.abs().sum(-1) > 0
            yield i, inputs.float().abs().sum(-1)[counts]


@contextmanager
def _calls(layers: list[nn.Module]) -> Iterator[list[tuple[int, Tensor, Tensor]]]:
    """A list that every call of the layers adds to: which one, its input and its output."""
    calls: list[tuple[int, Tensor, Tensor]] = []

    def note(i: int) -> Any:
        return lambda _, inputs, output: calls.append((i, inputs[0].detach(), output))

    handles = [layer.register_forward_hook(note(i)) for i, layer in enumerate(layers)]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _linear_layers(model: nn.Module) -> list[nn.Module]:
    """The linear layers that are trained in full.

    Raises:
        ConfigError: if there are none, or a part of the model that has none is trained in full.
    """
    layers: list[nn.Module] = []
    for name, wrapper in _wrappers(model):
        if not any(p.requires_grad for p in wrapper.parameters()):
            continue
        found = [
            m for m in wrapper.modules() if isinstance(m, nn.Linear) and m.weight.requires_grad
        ]
        if not found:
            raise ConfigError(
                f"head_learning_rate={SUGGESTED!r} is for new heads of linear layers, but {name} has "
                "none and is trained in full as well; give a number."
            )
        layers += found
    if not layers:
        raise ConfigError(_NO_HEADS.format(rate=SUGGESTED))
    return layers


def _wrappers(model: nn.Module) -> list[tuple[str, ModulesToSaveWrapper]]:
    named = model.named_modules()
    return [(name, m) for name, m in named if isinstance(m, ModulesToSaveWrapper)]
