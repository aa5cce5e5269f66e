"""Factorisations have the digits of float32 whatever the training loop allows."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from peft_gradinit.linalg import (
    TestMatrices,
    draw_test_matrix,
    exact_products,
    nystrom,
    randomized_svd,
    reconstruct,
    svd_of_product,
)
from peft_gradinit.methods.corda import corda_factors

matmul = torch.backends.cuda.matmul
OPTION, FAST, EXACT = (
    ("fp32_precision", "tf32", "ieee")
    if hasattr(matmul, "fp32_precision")
    else ("allow_tf32", True, False)
)


cpu = getattr(torch.backends.mkldnn, "matmul", None)


class Precisions(TorchDispatchMode):
    """Writes down what is allowed whenever matrices are multiplied."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if "mm" in str(func):
            self.seen.append(getattr(matmul, OPTION))
        return func(*args, **(kwargs or {}))


def sketch():
    G = torch.randn(60, 50)
    test = TestMatrices(draw_test_matrix(50, 30, seed=0), draw_test_matrix(60, 30, seed=1))
    return reconstruct(G @ test.Omega, G.T @ test.Psi, test, 4)


CASES = {
    "reconstruct": sketch,
    "nystrom": lambda: nystrom(torch.eye(40)[:, :20] * 2, torch.eye(40)[:, :20], 5),
    "randomized_svd": lambda: randomized_svd(torch.randn(40, 30), 4),
    "svd_of_product": lambda: svd_of_product(torch.randn(40, 6), torch.randn(30, 6), 4),
    "corda": lambda: corda_factors(torch.randn(20, 20), torch.eye(20), r=4, scaling=1.0),
}


@pytest.mark.parametrize("case", CASES)
def test_tf32_is_off_in_factorisations_and_on_again_afterwards(case):
    before = getattr(matmul, OPTION)
    setattr(matmul, OPTION, FAST)
    try:
        with Precisions() as precisions:
            CASES[case]()
        assert getattr(matmul, OPTION) == FAST
    finally:
        setattr(matmul, OPTION, before)
    first = 2 if case == "reconstruct" else 0  # the products of the case itself
    assert len(precisions.seen) > first
    assert set(precisions.seen[first:]) == {EXACT}


@pytest.mark.skipif(not hasattr(cpu, "fp32_precision"), reason="this torch has no such setting")
def test_medium_precision_on_the_cpu_is_left_for_factorisations():
    """Where a CPU can, it multiplies float32 matrices in bfloat16."""
    before = torch.get_float32_matmul_precision(), cpu.fp32_precision, matmul.fp32_precision
    torch.set_float32_matmul_precision("medium")
    try:
        users = cpu.fp32_precision
        assert users == "bf16"
        with exact_products(torch.device("cpu")):
            assert cpu.fp32_precision == "ieee"
        assert cpu.fp32_precision == users
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before[0])
        cpu.fp32_precision, matmul.fp32_precision = before[1:]
