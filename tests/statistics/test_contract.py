"""Laws that every statistic obeys; a statistic is a row of the table."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_gradinit.errors import ShapeError
from peft_gradinit.statistics import (
    DenseGradient,
    GradientStatistic,
    SketchedGradient,
    TestMatrixPool,
)
from tests.helpers import relative_error, same_subspace

OUT, IN, RANK = 150, 130, 4
N_TOKENS = 60

SUM = 1e-5
"""Float32 sums of 60 products in another order: 60 roundings of 6e-8 are 4e-6."""

PRODUCT = 1e-4
"""The same after a least-squares problem whose condition is below 10."""


def tokens(n=N_TOKENS, seed=1, noise=0.05):
    """Inputs and output gradients whose sum of outer products has four strong directions."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(0)
    to_x, to_dy = (torch.randn(RANK, d, generator=shared) for d in (IN, OUT))
    strength = torch.tensor([2.0, 1.5, 1.0, 0.7])
    hidden = torch.randn(n, RANK, generator=generator) * strength
    x = hidden @ to_x + noise * torch.randn(n, IN, generator=generator)
    dy = hidden @ to_dy + noise * torch.randn(n, OUT, generator=generator)
    return x, dy


def dense():
    return DenseGradient(OUT, IN)


def sketch(width=60, seed=0):
    return SketchedGradient(OUT, IN, width=width, seed=seed, pool=TestMatrixPool())


def oriented(width=60, seed=0):
    """An empty sketch with test matrices from a pilot, as one rank gives them to another."""
    pilot, empty = sketch(width, seed), sketch(width, seed)
    pilot.add(*tokens(seed=7))
    pilot.orient()
    state = pilot.state_dict()
    zeroed = {"Y": state["Y"] * 0, "Z": state["Z"] * 0, "weight": 0.0, "n_calls": 0}
    empty.load_state_dict({**state, **zeroed})
    return empty


class Row(NamedTuple):
    make: Callable[[], GradientStatistic]
    energy_tolerance: float  # relative, of |G|^2


# Of a matrix of stable rank 1.7, k Gaussian columns a side estimate the energy with a standard
# error of sqrt(2 / (2 k * 1.7)): 10 % for 60 columns, 12 % for the 40 that stay; four of them.
ROWS = {
    "dense": Row(dense, 1e-5),
    "sketch": Row(sketch, 0.4),
    "sketch oriented": Row(oriented, 0.5),
}


@pytest.fixture(params=ROWS.values(), ids=ROWS.keys())
def row(request):
    return request.param


@pytest.fixture
def make(row):
    return row.make


def filled(make, x, dy, weight=1.0, count=1.0):
    statistic = make()
    statistic.add(x, dy, weight)
    statistic.count(count)
    return statistic


def assert_same_sum(a, b, tolerance=SUM):
    assert a.tensors().keys() == b.tensors().keys()
    for name, tensor in a.tensors().items():
        assert relative_error(tensor, b.tensors()[name]) < tolerance, name


def copies(statistic):
    return {name: tensor.clone() for name, tensor in statistic.tensors().items()}


# --- what is estimated ---------------------------------------------------------------------------


def test_the_triplets_are_those_of_the_mean_gradient(make):
    x, dy = tokens()
    statistic = filled(make, x, dy, weight=3.0, count=12.0)

    U, S, Vh = svd = statistic.triplets(RANK)

    G = 3.0 * dy.T @ x / 12.0
    reference = torch.linalg.svd(G)
    # The noise is 1/400 of the signal's energy, and a sketch confuses a part of it with the signal.
    assert relative_error(svd.matrix(), G) < 0.02
    assert same_subspace(U, reference.U[:, :RANK]) > 0.999
    assert same_subspace(Vh.T, reference.Vh[:RANK].T) > 0.999
    torch.testing.assert_close(S, reference.S[:RANK], rtol=1e-2, atol=0)


def test_the_triplets_are_exact_if_the_gradient_has_no_more_directions_than_the_rank(make):
    x, dy = tokens(noise=0.0)

    assert relative_error(filled(make, x, dy).triplets(RANK).matrix(), dy.T @ x) < PRODUCT


def test_the_energy_is_the_squared_norm_of_the_mean_gradient(row):
    x, dy = tokens()
    statistic = filled(row.make, x, dy, weight=3.0, count=12.0)

    want = (3.0 * dy.T @ x / 12.0).square().sum().item()
    assert statistic.energy() == pytest.approx(want, rel=row.energy_tolerance)


def test_without_data_singular_values_and_energy_are_zero_and_vectors_finite(make):
    statistic = make()

    U, S, Vh = statistic.triplets(RANK)

    assert torch.equal(S, torch.zeros(RANK))
    torch.testing.assert_close(U.T @ U, torch.eye(RANK), atol=1e-5, rtol=0)
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(RANK), atol=1e-5, rtol=0)
    assert statistic.energy() == 0.0
    assert (statistic.weight, statistic.n_calls) == (0.0, 0)


@pytest.mark.parametrize("scale", [0.0, 1e-12, 1e12])
def test_any_scale_of_the_gradient_gives_finite_and_proportional_triplets(make, scale):
    x, dy = tokens()

    plain, scaled = filled(make, x, dy).triplets(RANK), filled(make, x, dy * scale).triplets(RANK)

    assert all(torch.isfinite(part).all() for part in scaled)
    torch.testing.assert_close(scaled.S, plain.S * scale, rtol=PRODUCT, atol=0)
    if scale:
        assert same_subspace(scaled.U, plain.U) > 1 - PRODUCT


# --- sums ----------------------------------------------------------------------------------------


def test_merging_two_halves_gives_what_one_accumulator_of_all_gives(make):
    x, dy = tokens()
    a = filled(make, x[:25], dy[:25], weight=25, count=25)
    b = filled(make, x[25:], dy[25:], weight=35, count=35)
    whole = make()
    for part, weight in ((slice(0, 25), 25), (slice(25, None), 35)):
        whole.add(x[part], dy[part], weight)
        whole.count(weight)

    before = copies(b)
    a.merge(b)

    assert_same_sum(a, whole)
    assert (a.weight, a.n_calls) == (whole.weight, whole.n_calls) == (60.0, 2)
    assert relative_error(a.triplets(RANK).matrix(), whole.triplets(RANK).matrix()) < PRODUCT
    assert all(torch.equal(tensor, before[name]) for name, tensor in b.tensors().items())


def test_merging_is_commutative_and_empty_accumulators_change_nothing(make):
    x, dy = tokens()
    ab, ba = filled(make, x[:25], dy[:25]), filled(make, x[25:], dy[25:])
    a, b = filled(make, x[:25], dy[:25]), filled(make, x[25:], dy[25:])
    ab.merge(b)
    ba.merge(a)
    assert_same_sum(ab, ba)

    empty, before = make(), copies(ab)
    ab.merge(empty)
    empty.merge(ab)

    for statistic in (ab, empty):
        assert all(torch.equal(before[name], t) for name, t in statistic.tensors().items())
        assert statistic.weight == 2.0


def test_a_merged_accumulator_shares_no_memory_with_the_other(make):
    x, dy = tokens()
    source, target = filled(make, x, dy), make()
    target.merge(source)
    before = copies(source)

    target.add(x, dy)

    assert all(torch.equal(tensor, before[name]) for name, tensor in source.tensors().items())


def test_order_and_split_of_the_tokens_do_not_matter(make):
    x, dy = tokens()
    at_once = filled(make, x, dy)
    order = torch.randperm(N_TOKENS, generator=torch.Generator().manual_seed(3))

    in_parts = make()
    for part in order.split([1, 7, 30, 22]):
        in_parts.add(x[part], dy[part])
    in_parts.count(1.0)

    assert_same_sum(in_parts, at_once)
    assert in_parts.n_calls == 4


def test_all_leading_dimensions_are_tokens(make):
    x, dy = tokens()

    folded = filled(make, x.reshape(3, 4, 5, IN), dy.reshape(3, 4, 5, OUT))

    assert_same_sum(folded, filled(make, x, dy), tolerance=1e-7)


def test_rows_without_output_gradient_do_not_matter(make):
    x, dy = tokens()
    padded_x = torch.cat([x, 100 * torch.randn(40, IN)])
    padded_dy = torch.cat([dy, torch.zeros(40, OUT)])

    assert_same_sum(filled(make, padded_x, padded_dy), filled(make, x, dy))


# --- weights -------------------------------------------------------------------------------------


def test_a_loss_scale_that_the_weight_divides_out_does_not_matter(make):
    x, dy = tokens()
    scale = 2.0**12

    assert_same_sum(filled(make, x, dy * scale, weight=1 / scale), filled(make, x, dy))


def test_batches_are_averaged_by_their_weights(make):
    (x, dy), (x2, dy2) = tokens(noise=0.0), tokens(seed=2, noise=0.0)
    statistic = make()
    for inputs, gradients, weight in ((x, dy, 30.0), (x2, dy2, 10.0)):
        statistic.add(inputs, gradients, weight)
        statistic.count(weight)

    want = (30 * dy.T @ x + 10 * dy2.T @ x2) / 40
    assert relative_error(statistic.triplets(RANK).matrix(), want) < PRODUCT


def test_reading_the_same_data_twice_leaves_the_mean_alone(make):
    x, dy = tokens()
    once, twice = filled(make, x, dy, 5.0, 5.0), filled(make, x, dy, 5.0, 5.0)
    twice.add(x, dy, 5.0)
    twice.count(5.0)

    assert relative_error(twice.triplets(RANK).matrix(), once.triplets(RANK).matrix()) < PRODUCT
    assert twice.energy() == pytest.approx(once.energy(), rel=1e-5)


def test_a_layer_used_twice_in_a_batch_sums_its_uses(make):
    # The weight of a batch is counted once, however often the layer runs in it.
    x, dy = tokens(noise=0.0)
    statistic = make()
    statistic.add(x, dy)
    statistic.add(x, dy)
    statistic.count(1.0)

    assert statistic.n_calls == 2
    assert relative_error(statistic.triplets(RANK).matrix(), 2 * dy.T @ x) < PRODUCT


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_state_is_float32_and_products_too_whatever_the_input(make, dtype):
    x, dy = (t.to(dtype) for t in tokens())

    statistic = filled(make, x, dy)

    assert {t.dtype for t in statistic.tensors().values()} == {torch.float32}
    # float() of the inputs is all that may be rounded: the sums are bit for bit the same.
    assert_same_sum(statistic, filled(make, x.float(), dy.float()), tolerance=1e-12)


def test_many_small_bfloat16_contributions_are_not_lost(make):
    # A bfloat16 sum stops growing once it is 256 times its increments.
    x, dy = (t[:4].bfloat16() for t in tokens())
    statistic = make()
    for _ in range(400):
        statistic.add(x, dy)

    once = filled(make, x, dy)
    for name in statistic.tensors().keys() & {"sum", "Y", "Z"}:
        # 400 float32 additions of equal terms: at most 400 roundings of 6e-8.
        assert relative_error(statistic.tensors()[name], 400 * once.tensors()[name]) < 2.4e-5


# --- state ---------------------------------------------------------------------------------------


def test_the_state_survives_a_round_trip_and_the_sum_goes_on(make):
    x, dy = tokens()
    original, restored = filled(make, x[:25], dy[:25], 2.0, 25.0), make()

    restored.load_state_dict(original.state_dict())
    for statistic in (original, restored):
        statistic.add(x[25:], dy[25:], 3.0)
        statistic.count(35.0)

    assert_same_sum(restored, original, tolerance=1e-12)
    assert (restored.weight, restored.n_calls) == (60.0, 2)
    assert torch.equal(restored.triplets(RANK).S, original.triplets(RANK).S)


def test_the_state_survives_safetensors(make, tmp_path):
    x, dy = tokens()
    original, restored = filled(make, x, dy, 2.0, 60.0), make()
    state = {k: torch.as_tensor(v) for k, v in original.state_dict().items()}
    save_file(state, tmp_path / "state.safetensors")

    restored.load_state_dict(load_file(tmp_path / "state.safetensors"))

    assert (restored.weight, restored.n_calls) == (60.0, 1)
    assert torch.equal(restored.triplets(RANK).matrix(), original.triplets(RANK).matrix())
    assert restored.energy() == original.energy()


def test_a_loaded_accumulator_shares_no_memory_with_the_state(make):
    x, dy = tokens()
    original, restored = filled(make, x, dy), make()
    before = copies(original)

    restored.load_state_dict(original.state_dict())
    restored.add(x, dy)

    assert all(torch.equal(tensor, before[name]) for name, tensor in original.tensors().items())


def test_loading_forgets_what_was_there_before(make):
    x, dy = tokens()
    statistic = filled(make, x, dy)

    statistic.load_state_dict(make().state_dict())

    assert statistic.energy() == 0.0
    assert (statistic.weight, statistic.n_calls) == (0.0, 0)


def test_n_bytes_is_the_size_of_the_tensors(make, tmp_path):
    statistic = filled(make, *tokens())

    assert statistic.n_bytes() == sum(4 * t.numel() for t in statistic.tensors().values()) > 0


def test_accumulating_is_without_gradients_and_touches_neither_inputs_nor_the_generator(make):
    x, dy = tokens()
    given, before = (x.clone().requires_grad_(), dy.clone()), torch.get_rng_state()

    statistic = filled(make, *given)
    statistic.triplets(RANK)

    assert not any(t.requires_grad for t in statistic.tensors().values())
    assert torch.equal(given[0], x)
    assert torch.equal(given[1], dy)
    assert torch.equal(torch.get_rng_state(), before)


# --- refusals ------------------------------------------------------------------------------------


def test_merging_another_shape_is_refused_with_both_shapes(make):
    other = DenseGradient(OUT, IN + 1)
    if isinstance(make(), SketchedGradient):
        other = SketchedGradient(OUT, IN + 1, width=60, seed=0, pool=TestMatrixPool())

    with pytest.raises(ShapeError, match=r"\(150, 131\) into .*\(150, 130\)"):
        make().merge(other)


def test_merging_another_kind_is_refused_with_both_kinds(make):
    other = dense() if isinstance(make(), SketchedGradient) else sketch()
    mine, theirs = type(make()).__name__, type(other).__name__

    with pytest.raises(ShapeError, match=rf"{theirs}.* into {mine}"):
        make().merge(other)


def test_a_refused_merge_changes_nothing(make):
    statistic = filled(make, *tokens())
    before = copies(statistic)

    with pytest.raises(ShapeError):
        statistic.merge(filled(lambda: DenseGradient(IN, OUT), *reversed(tokens())))

    assert statistic.weight == 1.0
    assert all(torch.equal(tensor, before[name]) for name, tensor in statistic.tensors().items())
