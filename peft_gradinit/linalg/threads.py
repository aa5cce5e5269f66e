"""How many threads small factorisations use."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def one_thread() -> Iterator[None]:
    """Run CPU code on one thread, and restore the number of threads afterwards.

    LAPACK on matrices of a hundred columns is faster on one thread than on two (15 ms against 37 ms
    for a reconstruction at 1536 x 1536, width 112). Where other processes share the cores, its
    threads wait for each other: 18 ms against 2.7 s at 4096 x 1536.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
