"""The same digits on every device: float32 products, float64 where it is needed, factorisations.

Devices differ in what they can do. MPS and some XPUs have no float64, MPS has no eigendecomposition,
and CUDA rounds float32 products to TF32 if the user allows it. What a device lacks is computed on
the CPU; only the factors of small matrices and scalars are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor


@contextmanager
def exact_products(device: torch.device) -> Iterator[None]:
    """Without TF32 and without autocast, for the length of the block.

    TF32 keeps three digits: a Gram matrix in it has eigenvalues below zero.
    """
    matmul: Any = torch.backends.cuda.matmul
    option, exact = ("fp32_precision", "ieee")
    if not hasattr(matmul, option):  # before torch 2.9
        option, exact = ("allow_tf32", False)
    before = getattr(matmul, option)
    setattr(matmul, option, exact)
    known = torch.amp.is_autocast_available(device.type)
    try:
        with torch.autocast(device.type, enabled=False) if known else nullcontext():
            yield
    finally:
        setattr(matmul, option, before)


def double(tensor: Tensor) -> Tensor:
    """The tensor in float64: on its device, or on the CPU if the device has no float64."""
    try:
        return tensor.double()
    except (TypeError, RuntimeError):  # of MPS, of XPU
        return tensor.cpu().double()


def eigh(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.eigh`, wherever it runs; the result is on the device of `matrix`."""
    return _where_it_runs(torch.linalg.eigh, matrix)


def qr(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """`torch.linalg.qr`, wherever it runs; the result is on the device of `matrix`."""
    return _where_it_runs(torch.linalg.qr, matrix)


def svd(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The thin `torch.linalg.svd`, wherever it runs; the result is on the device of `matrix`."""
    return _where_it_runs(_thin_svd, matrix)


def singular_values(matrix: Tensor) -> Tensor:
    """`torch.linalg.svdvals`, wherever it runs; the result is on the device of `matrix`."""
    return _where_it_runs(torch.linalg.svdvals, matrix)


def inverse(matrix: Tensor) -> Tensor:
    """`torch.linalg.inv`, wherever it runs; the result is on the device of `matrix`."""
    return _where_it_runs(torch.linalg.inv, matrix)


def _thin_svd(matrix: Tensor) -> tuple[Tensor, ...]:
    return torch.linalg.svd(matrix, full_matrices=False)


def _where_it_runs(function: Callable[[Tensor], Any], matrix: Tensor) -> Any:
    try:
        return function(matrix)
    except NotImplementedError:
        found = function(matrix.cpu())
        if isinstance(found, Tensor):
            return found.to(matrix.device)
        return tuple(part.to(matrix.device) for part in found)
