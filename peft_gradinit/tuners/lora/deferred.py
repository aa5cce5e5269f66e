"""Deferred adapters, which compute what the base model does and refuse to train without a start."""

from functools import partial
from itertools import product
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from ...errors import NotInitializedError
from ...layouts import unwrapped

_HANDLE = "_gradinit_deferred"
_LOADING = "_gradinit_started_by_loading"


def defer(layer: Any, adapter_name: str) -> None:
    """Make a training step through this adapter raise `NotInitializedError`."""
    for linear in _factors(layer, adapter_name):
        handle = (
            layer.register_forward_hook(partial(_refuse_parameter, adapter_name))
            if isinstance(layer, ParamWrapper)  # it reads the factors' weights and never calls them
            else linear.register_forward_hook(_refuse_to_train)
        )
        setattr(linear, _HANDLE, handle)
    if not hasattr(layer, _LOADING):
        handle = layer.register_load_state_dict_pre_hook(_start_loaded)
        setattr(layer, _LOADING, handle)


def mark_started(layer: nn.Module | LoraLayer, adapter_name: str) -> None:
    """Allow the adapter to train: it has its start."""
    for linear in _factors(layer, adapter_name):
        handle = linear.__dict__.pop(_HANDLE, None)
        if handle is not None:
            handle.remove()


def is_deferred(layer: nn.Module, adapter_name: str) -> bool:
    """Whether this adapter of this layer has no start yet."""
    return any(_HANDLE in linear.__dict__ for linear in _factors(layer, adapter_name))


def deferred_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters of a model that have no start yet."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    names = dict.fromkeys(name for layer in layers for name in layer.lora_A)
    return [name for name in names if any(is_deferred(layer, name) for layer in layers)]


def _start_loaded(layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """A state dict that holds every tensor of an adapter of this layer brings its start.

    PEFT, Accelerate and Lightning all load through `load_state_dict`, which calls this hook.
    """
    own = [key for key in layer.state_dict() if key.startswith("lora_")]
    for name in layer.lora_A:
        keys = [key for key in own if key.split(".")[1] == name]
        if keys and all(prefix + key in state_dict for key in keys):
            mark_started(layer, name)


def _factors(layer: Any, adapter_name: str) -> list[nn.Module]:
    if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
        return []
    return [unwrapped(layer.lora_A[adapter_name])]


def _refuse_parameter(adapter_name: str, layer: Any, args: Any, output: Any) -> None:
    if adapter_name not in layer.active_adapters or layer.disable_adapters or layer.merged:
        return
    # The hook outlives an adapter that PEFT deletes, and another one may have the name by now.
    waiting = [linear for linear in _factors(layer, adapter_name) if _HANDLE in linear.__dict__]
    results = output if isinstance(output, tuple) else (output,)  # routers return several
    for linear, result in product(waiting, results):
        if isinstance(result, torch.Tensor) and result.requires_grad:
            _refuse_to_train(linear, args, result)


def _refuse_to_train(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    trains = any(p.requires_grad for p in module.parameters())
    if not trains or not torch.is_grad_enabled():
        return
    if module.training:
        _raise_deferred()
    # In eval mode the output may be used, but not differentiated.
    output.register_hook(_raise_deferred)


def _raise_deferred(*_: Any) -> None:
    raise NotInitializedError(
        "this adapter was made with calibration='deferred' and has no start yet; before training, "
        "call peft_gradinit.initialize(model, data), or load a checkpoint; with "
        "transformers.Trainer or TRL, "
        "trainer.add_callback(peft_gradinit.CalibrationCallback(trainer))."
    )
