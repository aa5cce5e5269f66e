"""Angles between subspaces, and how much of a spectrum counts."""

import math

import pytest
import scipy.linalg
import torch

from peft_gradinit.errors import ShapeError
from peft_gradinit.linalg import (
    Factors,
    effective_rank,
    inner_product,
    intruder_dimensions,
    joined,
    negated,
    principal_angles,
    truncated_svd,
)


def basis(n, k, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(n, k, generator=generator, dtype=torch.float64)).Q


@pytest.mark.parametrize(("m", "n"), [(3, 3), (2, 5), (5, 2)])
def test_angles_are_those_of_scipy(m, n):
    first, second = basis(12, m, 0), basis(12, n, 1)
    want = scipy.linalg.subspace_angles(first.numpy(), second.numpy())[::-1]
    assert principal_angles(first, second).tolist() == pytest.approx(want.tolist(), abs=1e-10)


def test_small_angles_keep_their_digits():
    first = torch.eye(6, 2, dtype=torch.float64)
    second = first.clone()
    second[:, 1] = torch.tensor([0, math.cos(1e-9), math.sin(1e-9), 0, 0, 0])
    assert principal_angles(first, second)[1].item() == pytest.approx(1e-9, rel=1e-3)


def test_angles_need_one_dimension():
    with pytest.raises(ShapeError, match="dimensions 4 and 5"):
        principal_angles(basis(4, 2, 0), basis(5, 2, 0))


def test_effective_rank_counts():
    assert effective_rank(torch.ones(5)) == pytest.approx(5)
    assert effective_rank(torch.tensor([3.0, 0, 0])) == pytest.approx(1)
    assert effective_rank(torch.zeros(3)) == 0
    shares = torch.tensor([0.5, 0.25, 0.25])
    assert effective_rank(7 * shares) == pytest.approx(2**1.5)


def test_intruders_are_vectors_that_the_base_lacks():
    base = basis(8, 8, 0)
    tuned = truncated_svd(4 * base[:, :1] @ basis(6, 1, 2).T, 1)
    assert intruder_dimensions(tuned, base).tolist() == []
    new = base.sum(dim=1, keepdim=True) / 8**0.5  # cosine 0.354 with each
    tuned = truncated_svd(4 * new @ basis(6, 1, 2).T, 1)
    assert intruder_dimensions(tuned, base, 0.5).tolist() == [0]
    assert intruder_dimensions(tuned, base, 0.3).tolist() == []


def test_sums_of_updates_are_exact():
    generator = torch.Generator().manual_seed(0)
    one, other = (
        Factors(torch.randn(r, 7, generator=generator), torch.randn(9, r, generator=generator))
        for r in (2, 3)
    )
    both = joined(one, negated(other))
    assert both.r == 5
    torch.testing.assert_close(both.matrix(), one.matrix() - other.matrix())
    want = (one.matrix() * other.matrix()).sum().item()
    assert inner_product(one, other) == pytest.approx(want, rel=1e-5)
    torch.testing.assert_close(both.svd().matrix(), both.matrix(), rtol=1e-4, atol=1e-5)
    cut, error = both.truncated(2)
    lost = (both.matrix() - cut.matrix()).norm() / both.matrix().norm()
    assert error == pytest.approx(lost.item(), rel=1e-4)
