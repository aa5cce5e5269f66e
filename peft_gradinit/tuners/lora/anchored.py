r"""The anchored pair: trainable factors minus the constant product of their start.

LoRA-GA starts at `B0 A0 != 0` and needs `W x` unchanged. Instead of writing `W - s B0 A0` into the
base, `lora_A.weight` becomes `[A; A0]`, `(2r, in)`, and `lora_B.weight` becomes `[B, -B0]`,
`(out, 2r)`, through `torch.nn.utils.parametrize`: `A` and `B` are the trainable parameters, `A0`
and `-B0` are buffers. PEFT's forward, merging, `get_delta_weight` and quantised layers all see an
ordinary LoRA of rank `2r` that computes `s (B A - B0 A0) x`, and the saved file is that LoRA.
"""

from typing import Any, cast

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...errors import warn
from ...layouts import assign, unwrapped
from ...starts import linear_weight
from .pairs import Pair, n_experts


class Anchor(nn.Module):
    """Appends a constant block to a weight.

    Attributes:
        anchor: `A0` or `-B0`, of the shape of the trainable weight, float32.
        dim: dimension of the rank: 0 for `lora_A`, 1 for `lora_B`.
        n: number of experts that the weight is for; 1 for layers.
    """

    anchor: Tensor

    def __init__(self, anchor: Tensor, dim: int, n: int = 1) -> None:
        super().__init__()
        self.register_buffer("anchor", anchor)
        self.dim = dim
        self.n = n

    def forward(self, trainable: Tensor) -> Tensor:
        """`[A; A0]`, `(n 2r, in)`, from `A (n r, in)`, or `[B, -B0]`, `(out, 2r n)`.

        The anchor is cast to the trainable weight's dtype, so that both have the same rounding.
        """
        return side_by_side(trainable, self.anchor.to(trainable), self.dim, self.n)


def _note_left_out(_module: nn.Module, state_dict: Any, prefix: str, *_: Any) -> None:
    """Warn if a state dict has a factor that is trained, and not its anchor."""
    if f"{prefix}original" in state_dict and f"{prefix}0.anchor" not in state_dict:
        warn(
            "the state dict has trained factors of an anchored adapter without their anchors, and the "
            "live ones stay: the function is right only if both adapters have one start. Load a whole "
            "state_dict(), or a saved adapter by load_for_training(model, directory)."
        )


def anchor_layer(layer: LoraLayer, adapter_name: str) -> None:
    """Give an injected LoRA layer an anchor of zeros."""
    for linear, dim in ((layer.lora_A[adapter_name], 0), (layer.lora_B[adapter_name], 1)):
        empty = torch.zeros_like(cast("Tensor", linear.weight), dtype=torch.float32)
        anchor = Anchor(empty, dim, n_experts(layer))
        parametrize.register_parametrization(linear, "weight", anchor, unsafe=True)
        parametrized: Any = linear.parametrizations
        parametrized.weight.register_load_state_dict_pre_hook(_note_left_out)


def fill(pair: Pair, A0: Tensor, B0: Tensor) -> None:
    """Set the trainable factors, and the anchor if there is one, to a start in that layout."""
    assign(pair.A, A0)
    assign(pair.B, B0)
    if pair.anchor is not None:
        for factors, anchor in ((pair.layer.lora_A, A0), (pair.layer.lora_B, -B0)):
            linear: Any = unwrapped(factors[pair.adapter_name])
            assign(linear.parametrizations.weight[0].anchor, anchor)


def renew_magnitude(pair: Pair) -> None:
    """Set DoRA's magnitude to the present norms of `W + s B A`; no effect without DoRA.

    PEFT has set it before the start was written, so that it does not fit `W + s B0 A0`.
    """
    layer: Any = pair.layer
    if pair.adapter_name not in layer.lora_magnitude_vector:
        return
    magnitude: Any = layer.lora_magnitude_vector[pair.adapter_name]
    A, B = (f[pair.adapter_name].weight.detach().float() for f in (layer.lora_A, layer.lora_B))
    norms = (linear_weight(layer.get_base_layer()) + pair.scaling * (B @ A)).norm(dim=1)
    magnitude.weight.data.copy_(norms.reshape(magnitude.weight.shape))


def is_anchored(layer: nn.Module, adapter_name: str) -> bool:
    """Whether this adapter of this layer is an anchored pair."""
    if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
        return False
    return parametrize.is_parametrized(layer.lora_A[adapter_name], "weight")


def side_by_side(first: Tensor, second: Tensor, dim: int, n: int) -> Tensor:
    """Concatenate factors along their rank, `lora_A` (`dim` 0) within each of `n` experts."""
    if dim == 1:  # `lora_B` has the experts of one rank next to each other
        return torch.cat([first, second], dim=1)
    blocks = [t.unflatten(0, (n, -1)) for t in (first, second)]
    return torch.cat(blocks, dim=1).flatten(0, 1)
