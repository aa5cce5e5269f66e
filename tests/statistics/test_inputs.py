"""Laws of the accumulators of layer inputs, and their agreement with an exact PCA."""

import pytest
import torch

from peft_gradinit.errors import ShapeError
from peft_gradinit.statistics import (
    DenseInputs,
    SketchedInputs,
    TestMatrixPool,
    input_statistic,
)
from tests.helpers import overlap, relative_error

IN, RANK, WIDTH = 96, 4, 44
FLOAT32 = 1e-5  # sums of a few hundred terms in another order
POOL = TestMatrixPool()


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


def sketch(centered=True, seed=0, width=WIDTH):
    return SketchedInputs(IN, width=width, seed=seed, pool=POOL, centered=centered)


def dense(centered=True):
    return DenseInputs(IN, centered=centered)


def filled(statistic, *parts):
    for part in parts:
        statistic.add(part)
    return statistic


def oriented(centered=True, pilot=None):
    """A sketch oriented on a pilot of its own."""
    statistic = filled(sketch(centered), tokens(100, seed=9) if pilot is None else pilot)
    statistic.orient()
    return statistic


KINDS = [dense, sketch, oriented]


def same(a, b, tolerance=FLOAT32):
    """Whether two accumulators hold the same statistic."""
    first, second = a.components(RANK), b.components(RANK)
    return (
        a.n_tokens == b.n_tokens
        and relative_error(a.mean(), b.mean()) < tolerance
        and abs(a.variance() / b.variance() - 1) < tolerance
        and relative_error(first.variance, second.variance) < tolerance
        and overlap(first.Vh, second.Vh) > 1 - tolerance
    )


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize("make", KINDS)
def test_merging_is_adding_all_at_once(make, centered):
    x = tokens()
    start = make(centered)
    parts = [start.copy() for _ in range(3)]
    # The parts after the first must not count the pilot again.
    for part in parts[1:]:
        part.load_state_dict({k: 0 * v if k not in ("V", "c") else v
                              for k, v in part.state_dict().items()})  # fmt: skip
    for part, rows in zip(parts, x.split([7, 193, 200]), strict=True):
        part.add(rows)
    merged = parts[0]
    merged.merge(parts[1])
    merged.merge(parts[2])

    assert same(merged, filled(start.copy(), x))
    assert merged.n_calls == start.n_calls + 3


@pytest.mark.parametrize("make", KINDS)
def test_neither_the_order_nor_the_split_of_the_tokens_matters(make):
    x = tokens()
    at_once = filled(make(), x)

    assert same(filled(make(), *x.split(9)), at_once)
    assert same(filled(make(), *reversed(x.split(100))), at_once)
    assert same(filled(make(), x.reshape(4, 20, 5, IN)), at_once)
    assert same(filled(make(), x[:0], x, x[:0]), at_once)


@pytest.mark.parametrize("make", KINDS)
def test_merging_with_an_empty_one_changes_nothing(make):
    whole = filled(make(), tokens())
    want = whole.copy()
    empty = whole.copy()
    empty.load_state_dict({"n_tokens": 0, "n_calls": 0} | {
        k: v for k, v in whole.state_dict().items() if k == "V"
    })  # fmt: skip

    whole.merge(empty)
    assert same(whole, want)
    empty.merge(want)
    assert same(empty, want)


@pytest.mark.parametrize("make", KINDS)
def test_half_precision_inputs_are_summed_in_float32(make):
    x = tokens().bfloat16()
    statistic = filled(make(), *x.split(50))

    assert all(t.dtype == torch.float32 for t in statistic.tensors().values())
    assert same(statistic, filled(make(), x.float()))


@pytest.mark.parametrize("make", KINDS)
def test_the_state_continues_elsewhere(make):
    x = tokens()
    first = filled(make(), x[:150])
    second = make()
    second.load_state_dict({k: torch.as_tensor(v) for k, v in first.state_dict().items()})
    first.add(x[150:])
    second.add(x[150:])

    assert same(first, second)
    assert second.n_bytes() == first.n_bytes() > 0


@pytest.mark.parametrize("make", KINDS)
def test_a_copy_is_independent(make):
    statistic = filled(make(), tokens())
    want = statistic.copy()
    copy = statistic.copy()
    copy.add(tokens(seed=4))
    copy.orient()

    assert same(statistic, want)
    assert not same(copy, want)


@pytest.mark.parametrize("centered", [True, False])
def test_dense_is_exact(centered):
    x = tokens()
    statistic = filled(dense(centered), *x.split(64))
    Vh, variance, total = pca(x, centered=centered)

    found = statistic.components(RANK)
    assert overlap(found.Vh.double(), Vh) > 1 - FLOAT32
    assert relative_error(found.variance.double(), variance) < FLOAT32
    assert statistic.variance() == pytest.approx(total, rel=FLOAT32)
    assert relative_error(statistic.mean(), x.mean(0)) < FLOAT32


@pytest.mark.parametrize("centered", [True, False])
def test_an_oriented_sketch_is_close_and_better_than_a_gaussian_one(centered):
    x = tokens(1200)
    Vh, variance, total = pca(x, centered=centered)
    plain = filled(sketch(centered), x)
    turned = filled(oriented(centered, pilot=x[:200]), x[200:])

    found = turned.components(RANK)
    assert overlap(found.Vh.double(), Vh) > 0.995
    assert overlap(found.Vh.double(), Vh) > overlap(plain.components(RANK).Vh.double(), Vh)
    assert relative_error(found.variance.double(), variance) < 0.01
    assert turned.variance() == pytest.approx(total, rel=FLOAT32)  # exact, not an estimate


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
    assert statistic.variance() == pytest.approx(total, rel=1e-3)
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


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_tokens_than_components_work(n):
    x = tokens(n)
    for make in KINDS[:2]:
        statistic = filled(make(), x)
        statistic.orient()
        Vh, variance = statistic.components(RANK)
        torch.testing.assert_close(Vh @ Vh.T, torch.eye(RANK), atol=1e-4, rtol=0)
        assert (variance[n - 1 :] < 1e-5 * tokens().var()).all()  # n points span n - 1 directions


def test_a_pilot_shorter_than_the_width_still_leads_to_the_components():
    x = tokens(1200)
    short = oriented(pilot=x[:10])
    short.add(x[10:100])
    short.orient()
    short.add(x[100:])

    assert overlap(short.components(RANK).Vh.double(), pca(x)[0]) > 0.95


@pytest.mark.parametrize("make", [dense, sketch])
def test_constant_inputs_have_no_variance(make):
    constant = torch.full((50, IN), 0.1)
    assert filled(make(), constant[:1], constant).variance() == 0.0
    assert filled(make(centered=False), 0 * constant).variance() == 0.0
    assert filled(make(centered=False), constant).variance() == pytest.approx(
        0.01 * IN, rel=FLOAT32
    )


@pytest.mark.parametrize("make", [dense, sketch])
def test_nothing_added_gives_zeros(make):
    statistic = make()
    statistic.orient()

    assert statistic.variance() == 0.0
    assert statistic.mean().eq(0).all()
    assert statistic.components(RANK).variance.eq(0).all()
    assert statistic.tensors() == {}


def test_inputs_that_are_not_finite_show_in_the_variance():
    x = tokens()
    x[3, 4] = float("nan")
    assert not filled(sketch(), tokens(), x).variance() < float("inf")


@pytest.mark.parametrize(
    "other",
    [sketch(seed=1), sketch(width=48), sketch(centered=False), dense(), oriented()],
)
def test_accumulators_of_another_kind_are_not_merged(other):
    with pytest.raises(ShapeError, match=r"cannot merge .* into SketchedInputs\(in 96, width 44"):
        filled(sketch(), tokens()).merge(other)


def test_sketches_oriented_from_other_data_are_not_merged():
    with pytest.raises(ShapeError, match="orient all of them from the same data"):
        oriented().merge(oriented(pilot=tokens(seed=5)))


@pytest.mark.parametrize(
    ("in_features", "estimator", "kind"),
    [(64, "sketch", DenseInputs), (1024, "sketch", SketchedInputs), (1024, "dense", DenseInputs)],
)
def test_the_smaller_accumulator_is_chosen(in_features, estimator, kind):
    statistic = input_statistic(
        in_features, rank=8, estimator=estimator, sketch_size=None, seed=0, pool=POOL
    )
    assert isinstance(statistic, kind)
    assert statistic.width == (96 if kind is SketchedInputs else in_features)


def test_dense_needs_no_width():
    statistic = input_statistic(1024, rank=8, estimator="dense", sketch_size=1, seed=0, pool=POOL)
    assert isinstance(statistic, DenseInputs)


def test_a_sketch_too_small_for_the_rank_is_refused():
    with pytest.raises(ShapeError, match=r"sketch_size=31 is too small for 8 components.* 32,"):
        input_statistic(1024, rank=8, estimator="sketch", sketch_size=31, seed=0, pool=POOL)
