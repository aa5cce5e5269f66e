"""Undoing an injection that fails, so that the model is as it was."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..records import keep_record


@contextmanager
def all_or_nothing(model: nn.Module, undo: Callable[[], object]) -> Iterator[None]:
    """Run a block that adds an adapter; if it fails, call `undo` and put `requires_grad` back.

    PEFT rolls back an `Exception` only in part, and an interruption not at all.
    """
    # By name, since offloading makes new parameters in every forward pass.
    trainable = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        # Parameters made in a caller's inference mode could never be trained.
        with torch.inference_mode(False):
            yield
    except BaseException:
        undo()
        for name, parameter in model.named_parameters():
            parameter.requires_grad = trainable.get(name, parameter.requires_grad)
        raise


def remove_adapter(tuner: BaseTuner, adapter_name: str) -> None:
    """Remove all there is of an adapter, and the wrappers of the layers that have no other one."""
    injected = any(
        isinstance(layer, BaseTunerLayer) and adapter_name in layer._all_available_adapter_names()
        for layer in tuner.model.modules()
    )
    if injected and len(tuner.peft_config) == 1:
        tuner.unload()
    elif injected:
        tuner.delete_adapter(adapter_name)
        while _unwrapped_one(tuner):
            pass
    tuner.peft_config.pop(adapter_name, None)
    keep_record(tuner.model, adapter_name, None)


def _unwrapped_one(tuner: BaseTuner) -> bool:
    """Put the base layer back in the place of one wrapper without adapters, the outermost first."""
    for path, layer in tuner.model.named_modules():
        if not isinstance(layer, tuner.tuner_layer_cls) or layer._all_available_adapter_names():
            continue
        base = cast("Any", layer).base_layer
        if isinstance(layer, MultiheadAttention):  # has wrapped a layer inside of its base
            base = layer.unload_and_optionally_merge_module(False, False, None)
        parent, _, child = path.rpartition(".")
        setattr(tuner.model.get_submodule(parent), child, base)
        return True
    return False
