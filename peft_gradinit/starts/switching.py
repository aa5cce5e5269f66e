"""Contexts that choose which adapters run and, unlike PEFT's, do not touch `requires_grad`."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

from ..errors import ConfigError


def check_not_merged(model: nn.Module) -> None:
    """Refuse a start from base weights that an adapter is merged into."""
    for layer in _adapted_layers(model):
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            raise ConfigError(
                f"the adapters {layer.merged_adapters} are merged into the base weights, from which "
                "a new adapter starts; call unmerge_adapter() first."
            )


@contextmanager
def adapters_disabled(model: nn.Module, adapter_name: str | None = None) -> Iterator[None]:
    """Run the base model alone; `ConfigError` if an adapter is merged into it.

    With an adapter's name, the copies of modules that it trains in full run in place of the base's:
    they are what its factors train with.
    """
    check_not_merged(model)
    layers = _adapted_layers(model)
    copies = [m for m in layers if _is_copy(m) and adapter_name in _adapters_of(m)]
    with (
        _attributes(layers, _disable_adapters=True),
        _attributes(copies, _disable_adapters=False, _active_adapter=[adapter_name]),
    ):
        yield


@contextmanager
def adapter_alone(model: nn.Module, adapter_name: str) -> Iterator[None]:
    """Run one adapter, with its own copies of the modules that it trains in full."""
    layers = _adapted_layers(model)
    having = [layer for layer in layers if adapter_name in _adapters_of(layer)]
    # Some of PEFT's layers fail on the name of an adapter that they do not have.
    with (
        _attributes(layers, _disable_adapters=False, _active_adapter=[]),
        _attributes(having, _active_adapter=[adapter_name]),
    ):
        yield


def _adapted_layers(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if _is_adapted(type(module))]


def _is_adapted(kind: type) -> bool:
    # Not `issubclass`: for abstract classes, as PEFT's are, it asks all of their children.
    return BaseTunerLayer in kind.__mro__ or AuxiliaryTrainingWrapper in kind.__mro__


def _is_copy(layer: nn.Module) -> bool:
    return AuxiliaryTrainingWrapper in type(layer).__mro__


def _adapters_of(layer: Any) -> set[str]:
    if isinstance(layer, BaseTunerLayer):
        return set(layer._all_available_adapter_names())
    return set(layer._get_available_adapters())


@contextmanager
def _attributes(layers: list[Any], **values: Any) -> Iterator[None]:
    """Set attributes of all layers, and put the old values back at the end."""
    before = [{name: getattr(layer, name) for name in values} for layer in layers]
    try:
        for layer in layers:
            vars(layer).update(values)
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            vars(layer).update(old)
