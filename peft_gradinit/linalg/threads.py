"""How many threads small factorisations use."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import TypeVar

import torch

from .precision import exact_products

T = TypeVar("T")
R = TypeVar("R")


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


def on_all_threads(function: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Call a function of small CPU factorisations for every item, each on a thread of its own.

    As many run at once as torch has threads. Results are those of one thread, bit for bit. The
    function must not depend on torch's modes, such as autocast, which a new thread does not have.

    Args:
        function: called once for each item.
        items: what it is called with.

    Returns:
        The results, in the order of the items.
    """
    items = list(items)
    n = min(torch.get_num_threads(), len(items))
    if n < 2:
        return [function(item) for item in items]
    # Settings of the process: set once outside, since threads would restore them in any order.
    with (
        one_thread(),
        exact_products(torch.device("cpu")),
        ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,)) as pool,
    ):
        return list(pool.map(function, items))
