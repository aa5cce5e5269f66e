"""Which model a measurement is of."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from ..errors import CalibrationError
from ..statistics import hash_weight
from .layouts import plain_name, whole


def model_fingerprint(model: nn.Module, skip: tuple[str, ...]) -> dict[str, str]:
    """Hash every base weight, under the names that it has without adapters.

    Args:
        model: the base model, with or without adapters.
        skip: parameters whose names contain one of these are not base weights.

    Returns:
        Hashes by parameter name.
    """
    hashes = {}
    for name, module, parameter in _parameters(model):
        if not any(part in name for part in skip):
            check_not_meta(name, parameter)
            plain = name.replace(".base_layer", "").replace(".original_module", "")
            stored = stored_weight(module) if name.endswith(".weight") else parameter
            hashes[plain_name(plain)] = hash_weight(whole(stored))
    return hashes


def stored_weight(module: nn.Module) -> Any:
    """The weight as a checkpoint would hold it; the module is not changed.

    bitsandbytes packs 4-bit weights anew, in place, when they are evaluated on a CPU.

    Args:
        module: any module with a weight.

    Returns:
        `module.weight`, or its unpacked copy.
    """
    return with_stored_weight(module).weight


def with_stored_weight(module: nn.Module) -> nn.Module:
    """The module, or a copy of it where its weight is packed for evaluation."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return module
    module = copy.deepcopy(module)
    module.state_dict()  # unpacks
    return module


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Every parameter once, with its full name and its module."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        yield name, modules[name.rpartition(".")[0]], parameter


def check_not_meta(name: str, parameter: Tensor) -> None:
    """Refuse a parameter that has no values.

    Args:
        name: full name of the parameter.
        parameter: of the model.

    Raises:
        CalibrationError: if it is on the meta device.
    """
    if parameter.device.type == "meta":
        raise CalibrationError(
            f"{name} is on the meta device, so the model cannot run and cannot be calibrated; load "
            "the weights first."
        )
