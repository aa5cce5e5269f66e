"""Products of activations: in half precision where accelerators are fast in it, with float32 sums.

A GPU multiplies half-precision matrices ten times as fast as float32 ones, and adds the products up
in float32 either way. Activations of a half-precision model have no more digits than that. So they
are multiplied as they are, and only the sums are float32. Test matrices are rounded to the dtype of
the activations. On the CPU, and where a device has no such product, everything is float32.
"""

import functools

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)


def product_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype in which activations are multiplied."""
    dtypes, device = {t.dtype for t in tensors}, tensors[0].device
    if len(dtypes) == 1 and dtypes <= {*HALVES} and _has_wide_sums(device.type, *dtypes):
        return dtypes.pop()
    return torch.float32


def add_product(total: Tensor, left: Tensor, right: Tensor, weight: float = 1.0) -> None:
    """Add `weight * left @ right` to a float32 matrix, in place."""
    if left.dtype == torch.float32:
        total.addmm_(left, right, alpha=weight)
    else:
        total.add_(torch.mm(left, right, out_dtype=torch.float32), alpha=weight)


@functools.cache
def _has_wide_sums(device: str, dtype: torch.dtype) -> bool:
    """Whether half-precision matrices can have a float32 product on a kind of devices."""
    if device in ("cpu", "meta"):
        return False
    probe = torch.zeros(8, 8, dtype=dtype, device=device)
    try:
        return torch.mm(probe, probe, out_dtype=torch.float32).dtype == torch.float32
    except (RuntimeError, TypeError):  # not on this device; not in this version of torch
        return False
