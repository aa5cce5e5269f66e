"""Nystrom: exact where it must be, close where it may not, finite everywhere."""

import pytest
import torch

from peft_gradinit.errors import ShapeError
from peft_gradinit.linalg import eigenpairs, explained_share, nystrom
from tests.helpers import overlap, relative_error

DIMENSION = 40
FLOAT32 = 1e-4  # the shift and two factorisations, in units of the largest eigenvalue


def psd(spectrum, seed=0, dtype=torch.float32):
    """A positive semi-definite matrix with these eigenvalues, and its eigenvectors as columns."""
    generator = torch.Generator().manual_seed(seed)
    V = torch.linalg.qr(torch.randn(DIMENSION, DIMENSION, generator=generator).double()).Q
    values = torch.zeros(DIMENSION).double()
    values[: len(spectrum)] = torch.as_tensor(spectrum).double()
    return ((V * values) @ V.T).to(dtype), V.to(dtype)


def gaussian(width, seed=1, dtype=torch.float32):
    return torch.randn(DIMENSION, width, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_of_rank_at_most_the_width_is_recovered(dtype):
    C, V = psd([5.0, 3.0, 2.0, 1.0], dtype=dtype)
    Omega = gaussian(8, dtype=dtype)

    found = nystrom(C @ Omega, Omega, 4)

    assert found.Vh.dtype == dtype
    assert relative_error(found.variance, torch.tensor([5.0, 3.0, 2.0, 1.0], dtype=dtype)) < FLOAT32
    assert overlap(found.Vh, V[:, :4].T) > 1 - FLOAT32


def test_oriented_test_matrices_make_a_slow_spectrum_exact():
    C, V = psd(1.0 / torch.arange(1, DIMENSION + 1).sqrt())
    oriented = torch.cat([V[:, :6], gaussian(4)], dim=1)
    random = gaussian(10)

    assert overlap(nystrom(C @ oriented, oriented, 6).Vh, V[:, :6].T) > 1 - FLOAT32
    assert overlap(nystrom(C @ random, random, 6).Vh, V[:, :6].T) < 0.9  # what orienting is for


def test_rows_are_orthonormal_and_values_descend_and_never_exceed_the_matrix():
    C, _ = psd(torch.arange(DIMENSION, 0, -1.0))
    Omega = gaussian(12)

    Vh, variance = nystrom(C @ Omega, Omega, 8)

    torch.testing.assert_close(Vh @ Vh.T, torch.eye(8), atol=1e-5, rtol=0)
    assert (variance.diff() <= 0).all()
    # The Nystrom approximation is below the matrix, so its eigenvalues are as well.
    assert (variance <= eigenpairs(C, 8).variance * (1 + FLOAT32)).all()


def test_the_scale_of_test_matrix_and_data_does_not_matter():
    C, _ = psd([5.0, 3.0, 2.0, 1.0, 0.5])
    Omega = gaussian(8)
    want = nystrom(C @ Omega, Omega, 3)

    for factor in (1e-12, 1e12):
        got = nystrom(factor * C @ Omega, Omega, 3)
        assert relative_error(got.variance / factor, want.variance) < FLOAT32
        assert overlap(got.Vh, want.Vh) > 1 - FLOAT32
    assert overlap(nystrom(C @ (7 * Omega), 7 * Omega, 3).Vh, want.Vh) > 1 - FLOAT32


@pytest.mark.parametrize("spectrum", [[], [2.0], [1e30, 1e10]])
def test_deficient_sketches_give_finite_orthonormal_components(spectrum):
    C, _ = psd(spectrum)
    Omega = gaussian(8)

    Vh, variance = nystrom(C @ Omega, Omega, 5)

    torch.testing.assert_close(Vh @ Vh.T, torch.eye(5), atol=1e-5, rtol=0)
    assert variance.isfinite().all()
    assert (variance >= 0).all()


def test_sketches_that_disagree_slightly_do_not_break_it():
    # Sums carried over from other test matrices are those of no single positive matrix.
    C, V = psd(1.0 / torch.arange(1, DIMENSION + 1))
    Omega = gaussian(10)
    Y = C @ Omega + 1e-3 * gaussian(10, seed=5)

    found = nystrom(Y, Omega, 2)

    assert found.Vh.isfinite().all()
    assert overlap(found.Vh, V[:, :2].T) > 0.95


def test_eigenpairs_are_exact_and_signs_canonical():
    C, V = psd([4.0, 2.0, 1.0])

    Vh, variance = eigenpairs(C, 3)

    assert relative_error(variance, torch.tensor([4.0, 2.0, 1.0])) < 1e-5
    assert (torch.abs((Vh * V[:, :3].T).sum(1)) > 1 - 1e-5).all()
    largest = Vh.gather(1, Vh.abs().argmax(1, keepdim=True))
    assert (largest > 0).all()


def test_the_explained_share_is_that_of_the_rayleigh_quotients():
    C, V = psd([4.0, 3.0, 2.0, 1.0])
    known = eigenpairs(C, 6)

    assert explained_share(V[:, :2].T, known) == pytest.approx(1, abs=1e-5)
    assert explained_share(V[:, 1:3].T, known) == pytest.approx(5 / 7, abs=1e-5)
    assert explained_share(V[:, 4:6].T, known) == pytest.approx(0, abs=1e-5)
    rotated = torch.linalg.qr(torch.randn(2, 2)).Q @ V[:, :2].T
    assert explained_share(rotated, known) == pytest.approx(1, abs=1e-5)
    assert explained_share(V[:, :2].T, eigenpairs(0 * C, 6)) == 1.0


@pytest.mark.parametrize(("rank", "width"), [(0, 4), (5, 4), (3, DIMENSION + 1)])
def test_impossible_ranks_are_refused(rank, width):
    Omega = gaussian(width)
    with pytest.raises(ShapeError, match=f"{width} columns .* cannot give {rank} components"):
        nystrom(Omega, Omega, rank)


@pytest.mark.parametrize("rank", [0, DIMENSION + 1])
def test_eigenpairs_refuse_impossible_ranks(rank):
    with pytest.raises(ShapeError, match=f"rank={rank}"):
        eigenpairs(torch.eye(DIMENSION), rank)
