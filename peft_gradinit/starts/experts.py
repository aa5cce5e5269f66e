"""Adapters on parameters that have no layer of their own: PEFT's `target_parameters`.

PEFT keeps the factors of all experts in one pair (see `tuners.lora.pairs`). Here every expert is a
target with a start of its own, under a name such as `model.layers.0.mlp.experts.gate_up_proj[3]`.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import ExpertWeight
from ..errors import TargetError
from ..layouts import whole


def expert_weights(name: str, module: nn.Module, parameter: str) -> dict[str, ExpertWeight]:
    """The matrices of the parameter `name` of a module, by name: `name`, or `name[0]`, … if 3-D."""
    tensor = getattr(module, parameter)
    shape = _full_shape(tensor)
    if len(shape) not in (2, 3) or not tensor.is_floating_point():
        raise TargetError(
            f"{name} is {tensor.dtype} of shape {shape}; target_parameters takes "
            "floating parameters (out, in) and (experts, out, in). Leave it out."
        )
    if len(shape) == 2:
        return {name: ExpertWeight(module, parameter, None, transposed=False)}
    transposed = bool(getattr(module, "is_transposed", False))
    return {f"{name}[{i}]": ExpertWeight(module, parameter, i, transposed) for i in range(shape[0])}


def expert_matrix(weight: ExpertWeight) -> Tensor:
    """The matrix as PEFT adapts it, `(out, in)`, float32."""
    tensor = whole(getattr(weight.module, weight.parameter)).detach()
    matrix = tensor if weight.index is None else tensor[weight.index]
    return (matrix.T if weight.transposed else matrix).float()


def expert_shape(weight: ExpertWeight) -> tuple[int, int]:
    """`(out, in)` of the matrix as PEFT adapts it."""
    first, second = _full_shape(getattr(weight.module, weight.parameter))[-2:]
    return (second, first) if weight.transposed else (first, second)


def scores_of_all(scores: list[Tensor], *, each_counts: bool) -> Tensor:
    """The scores of a parameter's ranks, float64 on the CPU.

    Args:
        scores: of each expert.
        each_counts: whether a rank is paid for by every expert, so that what they gain adds up;
            else it is paid for once, and their mean counts.
    """
    stacked = torch.stack([s.double().cpu() for s in scores])
    return stacked.sum(dim=0) if each_counts else stacked.mean(dim=0)


def _full_shape(parameter: Any) -> tuple[int, ...]:
    """The shape of a parameter, also of one that ZeRO-3 has partitioned."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
