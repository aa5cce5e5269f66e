"""The weight of a linear layer, whatever it is stored as."""

import copy
from typing import Any, cast

from peft.utils.integrations import dequantize_module_weight
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..calibration import whole, with_stored_weight


def linear_shape(module: nn.Module) -> tuple[int, int] | None:
    """`(out, in)` of a linear layer's weight in the layout of `nn.Linear`; `None` for others."""
    if isinstance(module, Conv1D):
        in_features, out_features = module.weight.shape
        return out_features, in_features
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    return None


def is_quantized(module: nn.Module) -> bool:
    """Whether the weight is stored in fewer bits than it is computed with."""
    weight: Any = getattr(module, "weight", None)
    if weight is None:
        return False
    return hasattr(weight, "quant_state") or not weight.is_floating_point()


def linear_weight(module: nn.Module) -> Tensor:
    """The weight as `(out, in)`, float32, dequantised if need be; the module is not changed.

    Args:
        module: `nn.Linear`, a bitsandbytes layer derived from it, or `Conv1D`.

    Returns:
        `(out, in)` float32; shares memory with the module where it can.
    """
    if is_quantized(module):
        # Copied, since dequantising writes to 8-bit layers.
        module = copy.deepcopy(with_stored_weight(module))
        weight = cast("Tensor", dequantize_module_weight(module))
    else:
        weight = whole(module.weight)
    weight = weight.detach().float()
    return weight.T if isinstance(module, Conv1D) else weight
