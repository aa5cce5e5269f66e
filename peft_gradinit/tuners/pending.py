"""Adapters whose start is yet to come: they evaluate as the base model and refuse to train."""

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from ..calibration import unwrapped
from ..errors import NotInitializedError

_HANDLE = "_gradinit_pending"


def hold(layer: LoraLayer, adapter_name: str) -> None:
    """Let a training step through this adapter raise `NotInitializedError`."""
    for linear in _factors(layer, adapter_name):
        handle = (
            layer.register_forward_hook(partial(_refuse_parameter, linear, adapter_name))
            if isinstance(layer, ParamWrapper)  # which reads the factors' weights
            else linear.register_forward_hook(_refuse_to_train)
        )
        setattr(linear, _HANDLE, handle)


def release(layer: nn.Module | LoraLayer, adapter_name: str) -> None:
    """Let the adapter train: its factors are what they should be."""
    for linear in _factors(layer, adapter_name):
        handle = linear.__dict__.pop(_HANDLE, None)
        if handle is not None:
            handle.remove()


def is_pending(layer: nn.Module, adapter_name: str) -> bool:
    """Whether this adapter of this layer still waits for its start."""
    return any(_HANDLE in linear.__dict__ for linear in _factors(layer, adapter_name))


def waiting_adapters(model: nn.Module) -> list[str]:
    """Names of the adapters of a model that still wait for their start."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    names = dict.fromkeys(name for layer in layers for name in layer.lora_A)
    return [name for name in names if any(is_pending(layer, name) for layer in layers)]


def _factors(layer: Any, adapter_name: str) -> list[nn.Module]:
    if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
        return []
    return [unwrapped(layer.lora_A[adapter_name])]


def _refuse_parameter(
    linear: nn.Module, adapter_name: str, layer: Any, args: Any, output: Any
) -> None:
    if adapter_name not in layer.active_adapters or layer.disable_adapters or layer.merged:
        return
    for result in output if isinstance(output, tuple) else (output,):  # routers return several
        if isinstance(result, torch.Tensor) and result.requires_grad:
            _refuse_to_train(linear, args, result)


def _refuse_to_train(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    trains = any(p.requires_grad for p in module.parameters())
    if not trains or not torch.is_grad_enabled():
        return
    if module.training:
        _raise_pending()
    output.register_hook(_raise_pending)  # in eval mode the output may be looked at, not trained on


def _raise_pending(*_: Any) -> None:
    raise NotInitializedError(
        "this adapter was made with calibration='deferred' and has no start yet; before training, call "
        "peft_gradinit.initialize(model, data), or load a checkpoint; with transformers.Trainer or TRL, "
        "trainer.add_callback(peft_gradinit.CalibrationCallback(trainer))."
    )
