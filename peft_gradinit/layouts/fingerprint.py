"""The fingerprint of a model: which weights a measurement belongs to."""

import copy
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from .offloading import check_loaded
from .sharding import plain_name
from .storage import is_hqq, parameter_hash


def model_fingerprint(model: nn.Module, skip: tuple[str, ...]) -> dict[str, str]:
    """Hash every base weight by its name without adapters; `skip`: parts of names to leave out."""
    check_loaded(model)
    hashes = {}
    for name, module, parameter in _parameters(model):
        if not any(part in name for part in skip):
            plain = name.replace(".base_layer", "").replace(".original_module", "")
            own = name.rpartition(".")[2]
            stored = stored_weight(module) if own == "weight" else parameter
            hashes[plain_name(plain)] = parameter_hash(module, own, stored)
    return hashes


def weight_hash(module: nn.Module) -> str:
    """Hash of a linear layer's weight, the same as its entry in `model_fingerprint`."""
    # HQQ's layers have no `weight`, or an empty one that older Transformers added.
    name = "W_q" if is_hqq(module) else "weight"
    stored = stored_weight(module) if name == "weight" else getattr(module, name)
    return parameter_hash(module, name, stored)


def stored_weight(module: nn.Module) -> Any:
    """The weight as a checkpoint would hold it; the module is not changed.

    bitsandbytes packs 4-bit weights anew, in place, when they are evaluated on a CPU. For such a
    weight the result is an unpacked copy.
    """
    return with_stored_weight(module).weight


def with_stored_weight(module: nn.Module) -> nn.Module:
    """The module, or an unpacked copy of it if its weight is packed for evaluation."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if not getattr(state, "packing_format_for_cpu", False):
        return module
    module = copy.deepcopy(module)
    module.state_dict()  # unpacks
    return module


def _parameters(model: nn.Module) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Every parameter with its full name and its module; tied ones under each of their names.

    Offloading unties weights, and the hashes must have the same names before and after.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    for name, parameter in model.named_parameters(remove_duplicate=False):
        yield name, modules[name.rpartition(".")[0]], parameter
