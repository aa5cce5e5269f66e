"""DoRA's magnitudes, which PEFT computes before the factors have their start."""

from typing import Any

from torch import Tensor

from .weights import linear_weight


def renew_magnitude(layer: Any, adapter_name: str) -> None:
    """Set DoRA's magnitude to the norms of `W + s B A` as it is now; no effect without DoRA.

    With a magnitude from before the start, the layer would not compute `W + s B0 A0` at step 0.

    Args:
        layer: an injected LoRA layer over a linear one.
        adapter_name: which adapter.
    """
    if adapter_name not in layer.lora_magnitude_vector:
        return
    magnitude: Any = layer.lora_magnitude_vector[adapter_name]
    A, B = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    W = linear_weight(layer.get_base_layer())
    product: Tensor = B.detach().float() @ A.detach().float()
    norms = (W + layer.scaling[adapter_name] * product).norm(dim=1)
    magnitude.weight.data.copy_(norms.reshape(magnitude.weight.shape))
