"""Small factorisations on all threads: the same bits, in order, and the process as it was."""

import threading
from contextlib import nullcontext

import pytest
import torch

from peft_gradinit.linalg import on_all_threads
from peft_gradinit.linalg.threads import one_thread


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def test_results_are_those_of_one_thread_in_the_order_of_the_items(three_threads):
    matrices = [torch.randn(80, 40, generator=torch.Generator().manual_seed(i)) for i in range(20)]
    with one_thread():
        want = [torch.linalg.svd(matrix) for matrix in matrices]

    found = on_all_threads(torch.linalg.svd, matrices)

    for got, parts in zip(found, want, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(got, parts, strict=True))


def test_as_many_run_at_once_as_torch_has_threads_each_on_one(three_threads):
    together = threading.Barrier(3, timeout=60)  # breaks unless three wait at the same time

    def meet(_: int) -> int:
        together.wait()
        return torch.get_num_threads()

    assert on_all_threads(meet, range(3)) == [1, 1, 1]


@pytest.fixture
def tf32():
    """The user allows TF32; the fixture is the name of the setting and its value."""
    matmul = torch.backends.cuda.matmul
    new = hasattr(matmul, "fp32_precision")
    name, users = ("fp32_precision", "tf32") if new else ("allow_tf32", True)
    before = getattr(matmul, name)
    setattr(matmul, name, users)
    yield lambda: getattr(matmul, name) == users
    setattr(matmul, name, before)


@pytest.mark.parametrize("fails", [False, True])
def test_settings_of_the_process_are_as_they_were(three_threads, tf32, fails):
    def work(i: int) -> None:
        assert not tf32()
        if fails and i == 3:
            raise ValueError("the third")

    with pytest.raises(ValueError, match="the third") if fails else nullcontext():
        on_all_threads(work, range(6))

    assert torch.get_num_threads() == 3
    assert tf32()


def test_one_item_runs_where_it_is_called():
    assert on_all_threads(lambda _: threading.get_ident(), [0]) == [threading.get_ident()]
    assert on_all_threads(lambda _: 1, []) == []
