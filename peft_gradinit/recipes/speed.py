"""How fast a device multiplies matrices."""

import time
from collections.abc import Callable

import torch

SIZES = (1024, 2048, 4096, 8192)
"""Widths of square matrices. A product of the smallest takes 10 ms and more on a CPU, and on the
largest accelerators a few microseconds, less than it takes to ask for it."""

LONG_PRODUCT, LONG_RUN = 1e-4, 2e-2
"""Seconds beyond which asking for a product, and waiting for the result, no longer count."""


def flops_per_second(device: torch.device | str, dtype: torch.dtype) -> float:
    """The speed of large products of square matrices; a multiplication and an addition are two."""

    def run(size: int, n: int) -> float:
        a = torch.ones(size, size, device=device, dtype=dtype)
        a[0, 0].item()
        started = time.perf_counter()
        product = a
        for _ in range(n):
            product = a @ a
        product[0, 0].item()  # waits for the device
        return time.perf_counter() - started

    return speed_of(run)


def speed_of(run: Callable[[int, int], float]) -> float:
    """The speed of a device on which `run(size, n)` multiplies `n` times, and gives the seconds."""
    speed = 0.0
    for size in SIZES:
        run(size, 1)  # kernels are loaded, clocks rise
        n, seconds = 1, run(size, 1)
        while seconds < LONG_RUN:
            n *= 4
            seconds = run(size, n)
        speed = 2 * size**3 * n / seconds
        if seconds / n >= LONG_PRODUCT:
            break
    return speed
