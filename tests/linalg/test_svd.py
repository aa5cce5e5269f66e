"""Truncated SVDs: exact, randomised and of products; signs, bounds, dtypes, degenerate input."""

import pytest
import torch

from peft_gradinit.errors import ShapeError
from peft_gradinit.linalg import (
    TruncatedSVD,
    fix_signs,
    gram_svd,
    randomized_svd,
    svd_of_product,
    truncated_svd,
)
from tests.helpers import matrix_with_spectrum, relative_error, same_subspace

FLOAT32 = 1e-5
"""About 100 roundings of float32 (6e-8 each), which QR and SVD of these sizes accumulate."""

BFLOAT16 = 2e-2
"""Rounding the input to 8 bits moves each entry by up to 0.4 %; products have two such factors."""

FAST = 0.5 ** torch.arange(24)
SLOW = torch.arange(1, 41) ** -0.5

SHAPES = pytest.mark.parametrize(("out", "in_"), [(60, 40), (40, 60), (48, 48)])


def exact(matrix, rank):
    return truncated_svd(matrix, rank)


def randomized(matrix, rank):
    return randomized_svd(matrix, rank, generator=torch.Generator().manual_seed(0))


def of_product(matrix, rank):
    return svd_of_product(matrix, torch.eye(matrix.shape[1], dtype=matrix.dtype), rank)


EVERY_SVD = pytest.mark.parametrize("svd_of", [exact, randomized, of_product, gram_svd])


def matrix(out=60, in_=40, spectrum=FAST):
    return matrix_with_spectrum(out, in_, spectrum).float()


def tail(singular_values, rank):
    return torch.linalg.vector_norm(singular_values[rank:])


@EVERY_SVD
@SHAPES
def test_triplets_are_orthonormal_descending_and_give_the_best_product(svd_of, out, in_):
    G = matrix(out, in_)
    U, S, Vh = svd = svd_of(G, 6)

    assert (U.shape, S.shape, Vh.shape) == ((out, 6), (6,), (6, in_))
    torch.testing.assert_close(U.T @ U, torch.eye(6), atol=FLOAT32, rtol=0)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(6), atol=FLOAT32, rtol=0)
    torch.testing.assert_close(S, FAST[:6], atol=FLOAT32, rtol=0)
    # Eckart & Young: no rank-6 matrix is closer than the norm of the dropped singular values.
    assert (G - svd.matrix()).norm() <= tail(FAST, 6) * (1 + 1e-4)


@EVERY_SVD
def test_signs_are_canonical(svd_of):
    U, _, _ = svd_of(matrix(), 8)

    largest = U.abs().argmax(dim=0)
    assert (U[largest, torch.arange(8)] > 0).all()


@EVERY_SVD
def test_the_factors_of_minus_g_are_those_of_g_with_one_side_negated(svd_of):
    # A common sign alone is free, so both halves of each pair must be flipped together.
    G = matrix()
    plus, minus = svd_of(G, 5), svd_of(-G, 5)

    torch.testing.assert_close(minus.U, plus.U, atol=1e-4, rtol=0)
    torch.testing.assert_close(minus.Vh, -plus.Vh, atol=1e-4, rtol=0)


def test_fixing_signs_leaves_the_product_alone_and_does_not_depend_on_the_signs_that_came_in():
    svd = truncated_svd(matrix(), 8)
    flips = torch.tensor([1.0, -1, -1, 1, -1, 1, 1, -1])
    flipped = TruncatedSVD(svd.U * flips, svd.S, svd.Vh * flips[:, None])

    fixed = fix_signs(flipped)

    # A flip is exact in floating point, so no tolerance.
    assert torch.equal(fixed.matrix(), flipped.matrix())
    assert torch.equal(fixed.U, svd.U)
    assert torch.equal(fixed.Vh, svd.Vh)


@pytest.mark.parametrize(
    ("spectrum", "excess", "cosine"),
    # Without a gap after the eighth value the last direction is poorly determined, but the error
    # of the product, which is what an adapter gets, is not.
    [(FAST, 1e-4, 0.9999), (SLOW, 5e-3, 0.9)],
    ids=["quick decay", "slow decay"],
)
def test_the_randomised_svd_agrees_with_the_exact_one(spectrum, excess, cosine):
    G = matrix(96, 80, spectrum)

    approximate, reference = randomized(G, 8), truncated_svd(G, 8)

    best = (G - reference.matrix()).norm()
    assert (G - approximate.matrix()).norm() <= best * (1 + excess)
    assert same_subspace(approximate.U, reference.U) > cosine
    assert same_subspace(approximate.Vh.T, reference.Vh.T) > cosine
    torch.testing.assert_close(approximate.S, reference.S, atol=0, rtol=2e-2)


def test_power_iterations_are_what_makes_slow_decay_accurate():
    G = matrix(96, 80, SLOW)
    generator = torch.Generator().manual_seed(0)
    without = randomized_svd(G, 8, oversampling=2, n_power_iterations=0, generator=generator)
    generator = torch.Generator().manual_seed(0)
    with_ = randomized_svd(G, 8, oversampling=2, generator=generator)

    best = (G - truncated_svd(G, 8).matrix()).norm()
    # The excess error falls to a tenth at least; equal sketches, so chance plays no part.
    assert (G - with_.matrix()).norm() - best < 0.1 * ((G - without.matrix()).norm() - best)


def test_power_iterations_do_not_lose_small_directions():
    # Without any orthonormalisation, (1e-4)^9 is far below float32's resolution.
    spectrum = torch.tensor([1.0, 1e-1, 1e-2, 1e-3, 1e-4])

    svd = randomized(matrix(60, 40, spectrum), 5)

    torch.testing.assert_close(svd.S, spectrum, atol=1e-6, rtol=0)


def test_an_explicit_generator_makes_the_randomised_svd_deterministic():
    G = matrix(spectrum=SLOW)
    before = torch.get_rng_state()

    first, torch_seed_changed = randomized(G, 8), torch.manual_seed(123)
    state = torch_seed_changed.get_state()
    second = randomized(G, 8)

    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(before, state)  # the global seed did differ between the two


def test_other_generator_seeds_give_other_sketches():
    G = matrix(spectrum=SLOW)
    options = {"oversampling": 0, "n_power_iterations": 0}
    one, other = (
        randomized_svd(G, 4, generator=torch.Generator().manual_seed(seed), **options)
        for seed in (0, 1)
    )

    assert not torch.equal(one.S, other.S)


@EVERY_SVD
@pytest.mark.parametrize("rank", [-1, 0, 41, 1000])
def test_a_rank_out_of_bounds_raises_with_the_value(svd_of, rank):
    with pytest.raises(ShapeError, match=rf"between 1 and 40 .* rank={rank} "):
        svd_of(matrix(60, 40), rank)


def test_a_product_has_no_more_triplets_than_its_inner_dimension():
    with pytest.raises(ShapeError, match=r"between 1 and 3 .* rank=4 "):
        svd_of_product(torch.randn(20, 3), torch.randn(10, 3), 4)


@EVERY_SVD
def test_the_full_rank_is_allowed_and_exact(svd_of):
    G = matrix(12, 9, SLOW[:9])

    assert relative_error(svd_of(G, 9).matrix(), G) < FLOAT32


@pytest.mark.parametrize("inner", [5, 30, 80], ids=["narrow", "between", "wider than both"])
@SHAPES
def test_svd_of_product_is_the_svd_of_the_product(out, in_, inner):
    left = matrix_with_spectrum(out, inner, FAST[: min(5, inner)], seed=1).float()
    right = matrix_with_spectrum(in_, inner, torch.ones(min(in_, inner)), seed=2).float()

    got, want = svd_of_product(left, right, 3), truncated_svd(left @ right.T, 3)

    assert relative_error(got.matrix(), want.matrix()) < FLOAT32
    torch.testing.assert_close(got.S, want.S, atol=FLOAT32, rtol=0)


@EVERY_SVD
@pytest.mark.parametrize(
    ("dtype", "result", "tolerance"),
    [
        (torch.bfloat16, torch.float32, BFLOAT16),
        (torch.float16, torch.float32, BFLOAT16),
        (torch.float32, torch.float32, FLOAT32),
        (torch.float64, torch.float64, 1e-9),
    ],
    ids=str,
)
def test_works_in_float32_at_least_and_keeps_float64(svd_of, dtype, result, tolerance):
    G = matrix_with_spectrum(60, 40, torch.tensor([4.0, 2.0, 1.0]))
    given = G.to(dtype)

    svd = svd_of(given, 3)

    assert {t.dtype for t in svd} == {result}
    assert relative_error(svd.matrix().double(), G) < tolerance
    assert torch.equal(given, G.to(dtype))  # not modified


@EVERY_SVD
@SHAPES
def test_a_zero_matrix_has_finite_triplets_and_zero_singular_values(svd_of, out, in_):
    U, S, Vh = svd_of(torch.zeros(out, in_), 4)

    assert torch.equal(S, torch.zeros(4))
    torch.testing.assert_close(U.T @ U, torch.eye(4), atol=FLOAT32, rtol=0)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(4), atol=FLOAT32, rtol=0)


@EVERY_SVD
@SHAPES
def test_a_rank_deficient_matrix_is_given_back_with_finite_surplus_triplets(svd_of, out, in_):
    G = matrix(out, in_, torch.tensor([3.0, 1.0]))

    svd = svd_of(G, 7)

    assert relative_error(svd.matrix(), G) < FLOAT32
    assert svd.S[2:].max() < FLOAT32
    torch.testing.assert_close(svd.U.T @ svd.U, torch.eye(7), atol=FLOAT32, rtol=0)
    torch.testing.assert_close(svd.Vh @ svd.Vh.T, torch.eye(7), atol=FLOAT32, rtol=0)


def test_truncating_keeps_the_leading_triplets():
    G = matrix()
    direct, truncated = truncated_svd(G, 3), truncated_svd(G, 9).truncate(3)

    assert all(torch.equal(a, b) for a, b in zip(direct, truncated, strict=True))
