"""Products in the precision of their factors, whatever the training loop allows."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch


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
