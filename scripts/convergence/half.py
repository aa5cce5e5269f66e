"""bfloat16 products on CPUs that have no instructions for them.

There torch makes such a product forty times as slowly as one of float32. Those that have instructions add
in float32 and round the result, which is what is done here.
"""

import contextlib
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

aten = torch.ops.aten
PRODUCTS = {
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten._scaled_dot_product_flash_attention_for_cpu.default,
    aten._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
ATTENTION = aten._scaled_dot_product_flash_attention_for_cpu.default


class RoundedProducts(TorchDispatchMode):
    """Makes products of bfloat16 in float32, and rounds what comes out."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func not in PRODUCTS or not any(_is_half(value) for value in args):
            return func(*args, **kwargs)
        given = tree_map_only(Tensor, lambda t: t.float() if _is_half(t) else t, (args, kwargs))
        result = func(*given[0], **given[1])
        if func is ATTENTION:  # the logarithms of its sums are float32 in any case
            return result[0].bfloat16(), *result[1:]
        return tree_map_only(Tensor, Tensor.bfloat16, result)


def _is_half(value: Any) -> bool:
    return (
        isinstance(value, Tensor) and value.dtype == torch.bfloat16 and value.device.type == "cpu"
    )


def half_products(model: nn.Module) -> contextlib.AbstractContextManager:
    """What a model's runs are made in: rounded products if it needs them and the CPU has no others."""
    if any(_is_half(p) for p in model.parameters()):
        return rounded_products()
    return contextlib.nullcontext()


def rounded_products() -> contextlib.AbstractContextManager:
    """Rounded products if the CPU has no others."""
    if torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return contextlib.nullcontext()
    return RoundedProducts()
