"""The two accumulators of layer inputs: agreement with an exact PCA, and what the mean costs."""

import pytest
import torch

from peft_gradinit.statistics import DenseInputs, SketchedInputs, TestMatrixPool
from tests.helpers import overlap, relative_error

IN, RANK = 96, 4
FLOAT32 = 1e-5  # sums of a few hundred terms in another order


def tokens(n=400, mean=3.0, seed=0):
    """Tokens with a decaying spectrum and a mean that is larger than their spread."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.linalg.qr(torch.randn(IN, IN, generator=generator)).Q
    spread = 4.0 / torch.arange(1, IN + 1) ** 0.8
    offset = mean * torch.randn(IN, generator=generator)
    return (torch.randn(n, IN, generator=generator) * spread) @ basis.T + offset


def pca(x, rank=RANK, centered=True):
    """Exact components, eigenvalues and total variance, float64."""
    x = x.double()
    x = x - x.mean(0) if centered else x
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    return vectors.flip(1)[:, :rank].T, values.flip(0)[:rank], values.sum().item()


def sketch(centered=True):
    return SketchedInputs(IN, width=44, pool=TestMatrixPool(), centered=centered)


def dense(centered=True):
    return DenseInputs(IN, centered=centered)


def filled(statistic, *parts):
    for part in parts:
        statistic.add(part)
    return statistic


def oriented(pilot, centered=True):
    statistic = filled(sketch(centered), pilot)
    statistic.orient()
    return statistic


@pytest.mark.parametrize("centered", [True, False])
def test_dense_is_exact(centered):
    x = tokens()
    statistic = filled(dense(centered), *x.split(64))
    Vh, variance, total = pca(x, centered=centered)

    found = statistic.components(RANK)
    assert overlap(found.Vh.double(), Vh) > 1 - FLOAT32
    assert relative_error(found.variance.double(), variance) < FLOAT32
    assert statistic.energy() == pytest.approx(total, rel=FLOAT32)
    assert relative_error(statistic.mean(), x.mean(0)) < FLOAT32


@pytest.mark.parametrize("centered", [True, False])
def test_an_oriented_sketch_is_close_and_better_than_a_gaussian_one(centered):
    x = tokens(1200)
    Vh, variance, total = pca(x, centered=centered)
    plain = filled(sketch(centered), x)
    turned = filled(oriented(x[:200], centered), x[200:])

    found = turned.components(RANK)
    assert overlap(found.Vh.double(), Vh) > 0.995
    assert overlap(found.Vh.double(), Vh) > overlap(plain.components(RANK).Vh.double(), Vh)
    assert relative_error(found.variance.double(), variance) < 0.01
    assert turned.energy() == pytest.approx(total, rel=FLOAT32)  # exact, not an estimate


def test_the_mean_dominates_raw_components_and_is_absent_from_centered_ones():
    x = tokens(mean=30.0)
    direction = (x.mean(0) / x.mean(0).norm())[None]

    raw = filled(sketch(centered=False), x).components(1).Vh
    centered = filled(sketch(), x).components(RANK).Vh
    assert overlap(raw, direction) > 0.999
    assert (centered @ direction.T).square().sum() < 0.2


@pytest.mark.parametrize("make", [dense, sketch])
def test_a_mean_far_larger_than_the_spread_costs_no_digits(make):
    x = tokens(mean=0.0) + 1000 * torch.randn(IN)
    Vh, variance, total = pca(x)

    statistic = filled(make(), *x.split(50))
    assert statistic.energy() == pytest.approx(total, rel=1e-3)
    if make is dense:
        assert overlap(statistic.components(RANK).Vh.double(), Vh) > 1 - 1e-3
        assert relative_error(statistic.components(RANK).variance.double(), variance) < 1e-3


def test_orienting_keeps_what_was_summed():
    x = tokens()
    statistic = filled(sketch(), x)
    want = statistic.components(RANK)
    n_bytes = statistic.n_bytes()

    statistic.orient()

    got = statistic.components(RANK)
    assert overlap(got.Vh, want.Vh) > 1 - 1e-3
    assert relative_error(got.variance, want.variance) < 1e-3
    assert statistic.n_bytes() - n_bytes == 4 * IN * statistic.n_oriented
    assert statistic.n_bytes() < 4 * IN * IN


def test_a_pilot_shorter_than_the_width_still_leads_to_the_components():
    x = tokens(1200)
    short = oriented(x[:10])
    short.add(x[10:100])
    short.orient()
    short.add(x[100:])

    assert overlap(short.components(RANK).Vh.double(), pca(x)[0]) > 0.95


@pytest.mark.parametrize("make", [dense, sketch])
def test_constant_inputs_have_no_variance(make):
    constant = torch.full((50, IN), 0.1)
    assert filled(make(), constant[:1], constant).energy() == 0.0
    assert filled(make(), constant, constant[:1]).energy() == 0.0  # their mean is rounded
    assert filled(make(centered=False), 0 * constant).energy() == 0.0
    assert filled(make(centered=False), constant).energy() == pytest.approx(0.01 * IN, rel=FLOAT32)


@pytest.mark.parametrize("make", [dense, sketch])
@pytest.mark.parametrize("centered", [True, False])
def test_squares_that_overflow_are_not_taken_for_constant_inputs(make, centered):
    assert not filled(make(centered), 1e20 * tokens()).energy() < float("inf")
