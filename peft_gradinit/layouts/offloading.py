"""Models whose weights wait on the CPU or on disk until a layer runs (Accelerate's dispatch).

Accelerate replaces an offloaded weight with one on the meta device and gives its module a hook. For
each forward the hook puts the value from its `weights_map` on its `execution_device`. This module
reads values from that map and never writes to it: base files and maps stay as they are.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from accelerate.utils import PrefixedDataset
from torch import Tensor, nn

from ..errors import CalibrationError


def is_offloaded(module: nn.Module) -> bool:
    """Whether the module's own weights are loaded for each forward and dropped after it."""
    return _offloading_hook(module) is not None


def has_offloaded(model: nn.Module) -> bool:
    """Whether any part of the model is offloaded to the CPU or to disk."""
    return any(is_offloaded(module) for module in model.modules())


def execution_device(model: nn.Module) -> torch.device:
    """Where the model's first layer runs; for an offloaded layer that is not where its weight is.

    Batches are put there. The CPU for a model without weights.
    """
    for module in model.modules():
        if (hook := _offloading_hook(module)) is not None:
            device = hook.execution_device
            return torch.device("cpu" if device is None else device)
        for parameter in module.parameters(recurse=False):
            return parameter.device
    return torch.device("cpu")


def offloaded_value(module: nn.Module, name: str) -> Tensor:
    """The value that an offloaded module will compute with.

    It is the tensor in the hook's map, not a copy, if it waits on the CPU: do not write to it.

    Raises:
        CalibrationError: if there is no such value.
    """
    hook = _offloading_hook(module)
    try:
        return hook.weights_map[name]  # pyright: ignore[reportOptionalMemberAccess, reportOptionalSubscript]
    except (KeyError, OSError) as error:
        raise CalibrationError(
            f"the {name} of a {type(module).__name__} is offloaded, but its value cannot be read "
            f"({error!r}); load the model again, with the offload folder that its weights are in."
        ) from error


@contextmanager
def onloaded(module: nn.Module) -> Iterator[None]:
    """Load an offloaded module's own weights, not its children's; no effect on other modules."""
    hook = _offloading_hook(module)
    if hook is None:
        yield
        return
    try:
        hook.pre_forward(module)
        yield
    finally:
        hook.post_forward(module, None)


def check_loaded(model: nn.Module) -> None:
    """Refuse a model that lacks the values of a weight, so that it cannot run.

    Raises:
        CalibrationError: naming the first such weight, or a module that is offloaded as one piece.
    """
    keys: dict[int, set[str]] = {}
    for path, module in model.named_modules():
        hook = _offloading_hook(module)
        if hook is not None and hook.place_submodules:
            raise CalibrationError(
                f"{path or type(model).__name__} is offloaded with all that is inside it "
                "(preload_module_classes), so its layers cannot be given adapters that stay on the "
                "device; dispatch the model without preload_module_classes."
            )
        for name, parameter in module.named_parameters(recurse=False):
            is_waiting = hook is not None and _holds(hook.weights_map or {}, name, keys)
            if parameter.device.type == "meta" and not is_waiting:
                full_name = f"{path}.{name}" if path else name
                raise CalibrationError(
                    f"{full_name} is on the meta device, so the model cannot run and cannot be "
                    "calibrated; load the weights first."
                )


def _offloading_hook(module: nn.Module) -> AlignDevicesHook | None:
    hook: Any = getattr(module, "_hf_hook", None)
    for one in hook.hooks if isinstance(hook, SequentialHook) else (hook,):
        if isinstance(one, AlignDevicesHook) and one.offload:
            return one
    return None


def _holds(weights: Mapping[str, Tensor], name: str, keys: dict[int, set[str]]) -> bool:
    """Whether a map has a value, without reading it: `in` would load it from disk."""
    if isinstance(weights, PrefixedDataset):
        return _holds(weights.dataset, weights.prefix + name, keys)
    if id(weights) not in keys:
        keys[id(weights)] = set(weights)
    return name in keys[id(weights)]
