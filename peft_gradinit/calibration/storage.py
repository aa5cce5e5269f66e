"""What a weight is stored as: plain, offloaded, or packed by a quantisation backend.

bitsandbytes keeps integers in the weight itself. torchao and optimum-quanto make the weight a tensor
subclass around integers and scales, HQQ puts them beside it. All are told apart by where the class
comes from or by its attributes, so that none of the packages needs to be installed.
"""

import hashlib
from typing import Any

from torch import Tensor, nn

from ..statistics import hash_weight
from .layouts import whole
from .offloading import is_offloaded, offloaded_value

_TENSOR_SUBCLASSES = ("torchao.", "optimum.quanto.")


def is_packed(weight: Any) -> bool:
    """Whether a weight is a tensor subclass of torchao or optimum-quanto around its integers."""
    return type(weight).__module__.startswith(_TENSOR_SUBCLASSES)


def is_hqq(module: nn.Module) -> bool:
    """Whether a layer is HQQ's: its integers are in `W_q`, its scales in `meta`."""
    return hasattr(module, "W_q") and isinstance(getattr(module, "meta", None), dict)


def parameter_hash(module: nn.Module, name: str, parameter: Tensor) -> str:
    """Hash of a parameter as it is stored, the same wherever it waits.

    Args:
        module: the module that has the parameter.
        name: its name in the module.
        parameter: its stored value, if it is not offloaded.

    Returns:
        16 hexadecimal digits; for quantised weights of codes and scales together.
    """
    if is_offloaded(module):
        parameter = offloaded_value(module, name)
    parts = _parts(whole(parameter))
    if name == "W_q" and is_hqq(module):
        parts += _tensors_in(module.meta)
    hashes = [hash_weight(part) for part in parts]
    if len(hashes) == 1:
        return hashes[0]
    return hashlib.sha256("".join(hashes).encode()).hexdigest()[:16]


def _parts(weight: Any) -> list[Tensor]:
    """The plain tensors that a weight consists of, in a fixed order."""
    if not is_packed(weight):
        return [weight]
    names, _ = weight.detach().__tensor_flatten__()
    return [part for name in names for part in _parts(getattr(weight, name))]


def _tensors_in(values: Any) -> list[Tensor]:
    """Tensors of a nested dict, by sorted keys."""
    if isinstance(values, dict):
        return [t for key in sorted(values, key=str) for t in _tensors_in(values[key])]
    return [values.detach()] if isinstance(values, Tensor) else []
