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
    """Without TF32, bfloat16 and autocast in float32 products, for the length of the block.

    TF32 keeps three digits: a Gram matrix in it has eigenvalues below zero. bfloat16, which
    `torch.set_float32_matmul_precision("medium")` allows on CPUs, keeps two.
    """
    settings = _settings()
    before = [getattr(backend, option) for backend, option, _ in settings]
    for backend, option, exact in settings:
        setattr(backend, option, exact)
    known = torch.amp.is_autocast_available(device.type)
    try:
        with torch.autocast(device.type, enabled=False) if known else nullcontext():
            yield
    finally:
        for (backend, option, _), users in zip(settings, before, strict=True):
            setattr(backend, option, users)


def _settings() -> list[tuple[Any, str, Any]]:
    """Where torch keeps what float32 products may be rounded to, and the value of no rounding."""
    gpu: Any = torch.backends.cuda.matmul
    cpu: Any = getattr(torch.backends.mkldnn, "matmul", None)
    if not hasattr(gpu, "fp32_precision"):  # before torch 2.9
        return [(gpu, "allow_tf32", False)]
    return [(backend, "fp32_precision", "ieee") for backend in (gpu, cpu) if backend is not None]


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
