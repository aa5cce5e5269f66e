"""Truncation and padding of products against dense linear algebra."""

import pytest
import torch

from peft_gradinit.errors import ShapeError
from peft_gradinit.linalg import pad_rank, truncate_product


def factors(out=30, inner=12, into=40, dtype=torch.float32):
    B, A = torch.randn(out, inner, dtype=torch.float64), torch.randn(inner, into).double()
    return B.to(dtype), A.to(dtype)


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_truncation_is_the_best_approximation(rank):
    B, A = factors()
    result = truncate_product(B, A, rank)
    U, S, Vh = torch.linalg.svd(B.double() @ A.double(), full_matrices=False)
    best = (U[:, :rank] * S[:rank]) @ Vh[:rank]
    assert torch.allclose((result.B @ result.A).double(), best, atol=1e-4)
    assert result.relative_error == pytest.approx((S[rank:].norm() / S.norm()).item(), rel=1e-6)
    assert result.B.shape == (30, rank)
    assert result.A.shape == (rank, 40)


def test_error_is_that_of_the_product_of_the_factors_returned():
    B, A = factors(dtype=torch.float64)
    result = truncate_product(B, A, 4)
    got = ((result.B @ result.A - B @ A).norm() / (B @ A).norm()).item()
    assert result.relative_error == pytest.approx(got, rel=1e-9)


def test_rank_that_suffices_changes_nothing():
    B, A = factors()
    result = truncate_product(B, A, 12)
    assert result.B is B
    assert result.A is A
    assert result.relative_error == 0


def test_small_difference_of_large_products_keeps_its_digits():
    B0, A0 = factors(inner=6)
    step_B, step_A = factors(inner=2)
    # B0 A0 + 1e-4 step - B0 A0, of rank 2, in factors of rank 14 of size 1.
    B = torch.cat([B0, 1e-4 * step_B, -B0], dim=1)
    A = torch.cat([A0, step_A, A0])
    result = truncate_product(B, A, 2)
    want = 1e-4 * step_B.double() @ step_A.double()
    assert result.relative_error < 1e-6
    assert (result.B.double() @ result.A.double() - want).norm() < 1e-5 * want.norm()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_stays(dtype):
    B, A = factors(dtype=dtype)
    result = truncate_product(B, A, 11)
    assert result.B.dtype == result.A.dtype == dtype


def test_zero_product_has_no_error():
    result = truncate_product(torch.zeros(5, 3), torch.zeros(3, 4), 1)
    assert result.relative_error == 0
    assert not (result.B @ result.A).any()


def test_inner_size_larger_than_the_matrix():
    B, A = factors(out=4, inner=10, into=6)
    result = truncate_product(B, A, 4)
    assert torch.allclose(result.B @ result.A, B @ A, atol=1e-4)


def test_padding_keeps_the_product():
    B, A = factors()
    wide_B, wide_A = pad_rank(B, A, 16)
    assert (wide_B.shape, wide_A.shape) == ((30, 16), (16, 40))
    assert torch.allclose(wide_B @ wide_A, B @ A)


def test_wrong_ranks_are_refused():
    B, A = factors()
    with pytest.raises(ShapeError, match=r"cannot have rank=0; pass at least 1"):
        truncate_product(B, A, 0)
    with pytest.raises(ShapeError, match=r"shapes \(30, 12\) and \(40, 12\) have no product"):
        truncate_product(B, A.T, 2)
    with pytest.raises(ShapeError, match=r"rank 12 cannot be padded to rank=8; truncate"):
        pad_rank(B, A, 8)
