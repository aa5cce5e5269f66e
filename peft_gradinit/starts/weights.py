"""The weight of a linear layer of any kind; no other module tells the kinds apart."""

import copy
from typing import Any, cast

from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..layouts import is_hqq, is_packed, onloaded, whole, with_stored_weight

LINEAR_KINDS = (
    "nn.Linear and Conv1D, plain or offloaded, and linear layers quantised by bitsandbytes, "
    "torchao (weight-only), HQQ or optimum-quanto"
)
"""The kinds that `linear_shape` knows, for messages."""

_BITSANDBYTES = ("Params4bit", "Int8Params")


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(out, in)` of a linear layer's weight in the layout of `nn.Linear`; `None` for others."""
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return out_features, in_features
    if is_hqq(module) or (isinstance(module, nn.Linear) and _is_readable(module)):
        return int(cast("Any", module).out_features), int(cast("Any", module).in_features)
    return None


def _is_readable(module: nn.Module) -> bool:
    """Whether the weight's values can be computed, unlike codes of unknown quantisers."""
    weight: Any = getattr(module, "weight", None)
    if weight is None:  # FSDP1 removes it between forward passes
        return type(module) is nn.Linear
    plain = weight.is_floating_point() and weight.dtype.itemsize >= 2
    return plain or is_packed(weight) or type(weight).__name__ in _BITSANDBYTES


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight is stored in fewer bits than it is computed with."""
    if is_hqq(module):
        return True
    weight: Any = getattr(module, "weight", None)
    if weight is None:
        return False
    return hasattr(weight, "quant_state") or is_packed(weight) or not weight.is_floating_point()


def loses_merges(module: nn.Module) -> bool:
    """Whether a merge by PEFT has no effect, as on quanto's weights, which cannot be added to."""
    weight = getattr(module, "weight", None)
    return is_packed(weight) and type(weight).__module__.startswith("optimum.quanto.")


def linear_weight(module: nn.Module) -> Tensor:
    """The weight as `(out, in)`, float32, dequantised if need be, on the layer's device.

    It shares memory with the module's weight where it can. The module is not changed.
    """
    with onloaded(module):
        weight = _dequantized(module).detach().float()
    return weight.T if isinstance(module, Conv1D) else weight


def _dequantized(module: nn.Module) -> Tensor:
    weight: Any = getattr(module, "weight", None)
    if is_hqq(module) or is_packed(weight):
        return cast("Any", module if is_hqq(module) else weight.detach()).dequantize()
    if is_quantized(module):
        # Copied, since dequantising writes to 8-bit layers of bitsandbytes.
        module = copy.deepcopy(with_stored_weight(module))
        return cast("Tensor", dequantize_module_weight(module))
    return whole(weight)
