"""How a weight is stored: plain, offloaded, or packed by a quantisation backend.

bitsandbytes keeps integers in the weight itself. torchao and optimum-quanto make the weight a
tensor subclass around integers and scales, HQQ puts them beside it. Backends are told apart by the
module of the class or by attributes, so that none of the packages needs to be installed.
"""

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from .offloading import is_offloaded, offloaded_value
from .sharding import whole

_TENSOR_SUBCLASSES = ("torchao.", "optimum.quanto.")


def is_packed(weight: Any) -> bool:
    """Whether a weight is a tensor subclass of torchao or optimum-quanto around its integers."""
    return type(weight).__module__.startswith(_TENSOR_SUBCLASSES)


def is_hqq(module: nn.Module) -> bool:
    """Whether a layer is HQQ's: its integers are in `W_q`, its scales in `meta`."""
    return hasattr(module, "W_q") and isinstance(getattr(module, "meta", None), dict)


def hash_weight(weight: Tensor) -> str:
    """Hash a sample of a tensor, equal for float32 weights and for their bfloat16 copy.

    Takes up to 4,096 evenly spaced entries, so that a large model is read in no time. Floating
    entries are rounded to bfloat16 first; quantised storage is hashed as it is.
    """
    flat = weight.detach().reshape(-1)
    step = -(-flat.numel() // 4096) | 1  # odd, so that it walks through the columns as well
    flat = flat[::step].cpu()
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).view(torch.int16)
    digest = hashlib.sha256(flat.contiguous().numpy().tobytes())
    digest.update(str(tuple(weight.shape)).encode())
    return digest.hexdigest()[:16]


def parameter_hash(module: nn.Module, name: str, parameter: Tensor) -> str:
    """Hash of a parameter as it is stored, the same on every device and when offloaded.

    For quantised weights it is of codes and scales together. 16 hexadecimal digits.
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
    """The tensors of a nested dict, by sorted keys."""
    if isinstance(values, dict):
        return [t for key in sorted(values, key=str) for t in _tensors_in(values[key])]
    return [values.detach()] if isinstance(values, Tensor) else []
