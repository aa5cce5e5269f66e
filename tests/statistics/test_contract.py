"""Laws that every statistic obeys; a statistic is a row of the table."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file, save_file

from peft_gradinit.errors import ShapeError
from peft_gradinit.linalg import TruncatedSVD
from peft_gradinit.statistics import (
    DenseGradient,
    DenseInputs,
    GradientStatistic,
    SketchedGradient,
    SketchedInputs,
    Statistic,
    TestMatrixPool,
)
from tests.helpers import relative_error, same_subspace

OUT, IN, RANK = 150, 130, 4
N_TOKENS = 200
CPU = torch.device("cpu")

SUM = 1e-5
"""Float32 sums of 200 products in another order: 200 roundings of 6e-8 are 1.2e-5 at worst."""

PRODUCT = 1e-4
"""The same after a least-squares problem whose condition is below 10."""

BITS = 1e-12
"""The same operations in the same order."""


# --- rows ----------------------------------------------------------------------------------------


def sketched_gradient(in_features=IN, width=60, seed=0):
    return SketchedGradient(OUT, in_features, width=width, seed=seed, pool=TestMatrixPool())


def sketched_inputs(in_features=IN, **options):
    return SketchedInputs(in_features, **{"width": 60, "pool": TestMatrixPool(), **options})


class Row(NamedTuple):
    kind: Callable[..., Statistic]
    oriented: bool = False  # by a pilot, as one process gives test matrices to another
    energy: float = SUM  # its relative error

    def __call__(self, in_features=IN, pilot=7, **changes):
        statistic = self.kind(in_features=in_features, **changes)
        if self.oriented:
            x, dy = tokens(seed=pilot)
            filled(statistic, (x[:, :in_features], dy)).orient()
            test = {name: statistic.tensors()[name] for name in statistic.oriented_names}
            statistic.load_state_dict({**test, "weight": 0, "n_calls": 0})
        return statistic


# k Gaussian columns a side estimate the energy of a matrix of stable rank 1.7 with a standard error
# of sqrt(2 / (2 k * 1.7)): 10 % for 60 columns, 12 % for the 40 that stay; four of them.
ROWS = {
    "gradient": Row(partial(DenseGradient, OUT)),
    "gradient-sketched": Row(sketched_gradient, energy=0.4),
    "gradient-oriented": Row(sketched_gradient, oriented=True, energy=0.5),
    "inputs": Row(DenseInputs),
    "inputs-sketched": Row(sketched_inputs),
    "inputs-oriented": Row(sketched_inputs, oriented=True),
    "raw-inputs": Row(partial(DenseInputs, centered=False)),
    "raw-inputs-sketched": Row(partial(sketched_inputs, centered=False)),
    "raw-inputs-oriented": Row(partial(sketched_inputs, centered=False), oriented=True),
}


@pytest.fixture(params=ROWS.values(), ids=ROWS.keys())
def make(request):
    """Makes empty accumulators of a row."""
    return request.param


@pytest.fixture(params=[n for n in ROWS if n.startswith("gradient")])
def gradient(request):
    """The same of the rows whose contributions have weights."""
    return ROWS[request.param]


# --- data and comparison -------------------------------------------------------------------------


def tokens(n=N_TOKENS, seed=1, directions=IN, noise=0.0, mean=3.0):
    """Inputs and output gradients of decaying spectra; inputs have a mean larger than their spread."""
    generator = torch.Generator().manual_seed(seed)
    shared = torch.Generator().manual_seed(0)
    to_x, to_dy = (torch.linalg.qr(torch.randn(d, IN, generator=shared)).Q.T for d in (IN, OUT))
    offset = mean * torch.randn(IN, generator=shared)
    strength = 10.0 * torch.arange(1, directions + 1) ** -0.8
    hidden = torch.randn(n, directions, generator=generator) * strength
    x = hidden @ to_x[:directions] + noise * torch.randn(n, IN, generator=generator) + offset
    dy = hidden @ to_dy[:directions] + noise * torch.randn(n, OUT, generator=generator)
    return x, dy


few_directions = partial(tokens, directions=RANK, mean=0.0)


def filled(statistic, *parts):
    """Hand over what the kind takes of tokens, each part as one batch in which a token weighs 1."""
    for x, dy in parts:
        if isinstance(statistic, GradientStatistic):
            statistic.add(x, dy)
            statistic.count(x[..., 0].numel())
        else:
            statistic.add(x)
    return statistic


def split(sizes, data):
    return list(zip(*(t.split(sizes) for t in data), strict=True))


def read(statistic):
    """Leading triplets; those of a second moment have its components on both sides."""
    if isinstance(statistic, GradientStatistic):
        return statistic.triplets(RANK)
    Vh, variance = statistic.components(RANK)
    return TruncatedSVD(Vh.T, variance, Vh)


def exact(statistic, x, dy):
    """The matrix that is estimated, by its definition."""
    if isinstance(statistic, GradientStatistic):
        return dy.T @ x / len(x)
    x = x - x.mean(0) if statistic.centered else x
    return x.T @ x / len(x)


def means(statistic):
    """What must agree however the tokens came; sums of inputs are about a point that need not."""
    if isinstance(statistic, GradientStatistic):
        names = statistic.sum_shapes().keys() & statistic.tensors().keys()
        return {name: statistic.tensors()[name] / (statistic.weight or 1) for name in names}
    energy = torch.tensor(statistic.energy())
    return {"mean": statistic.mean(), "energy": energy, "variance": read(statistic).S}


def assert_same_means(a, b, tolerance=SUM):
    want = means(b)
    assert means(a).keys() == want.keys()
    for name, mean in means(a).items():
        assert relative_error(mean, want[name]) < tolerance, name
    assert relative_error(read(a).matrix(), read(b).matrix()) < tolerance * PRODUCT / SUM


def assert_same(a, b, tolerance=SUM):
    assert_same_means(a, b, tolerance)
    assert a.weight == b.weight


def copies(statistic):
    return {name: tensor.clone() for name, tensor in statistic.tensors().items()}


def assert_untouched(statistic, before):
    assert statistic.tensors().keys() == before.keys()
    for name, tensor in statistic.tensors().items():
        assert torch.equal(tensor, before[name]), name


# --- what is estimated ---------------------------------------------------------------------------


# The noise is 1/500 of the signal's energy, and a sketch confuses a part of it with the signal.
@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, PRODUCT), (0.05, 0.02)])
def test_what_is_read_is_of_the_mean_and_exact_if_it_has_no_other_directions(
    make, noise, tolerance
):
    data = few_directions(noise=noise)
    U, S, Vh = svd = read(filled(make(), data))
    matrix = exact(make(), *data)
    reference = torch.linalg.svd(matrix)
    assert relative_error(svd.matrix(), matrix) < tolerance
    assert same_subspace(U, reference.U[:, :RANK]) > 0.999
    assert same_subspace(Vh.T, reference.Vh[:RANK].T) > 0.999
    torch.testing.assert_close(S, reference.S[:RANK], rtol=1e-2, atol=0)


def test_the_energy_is_what_the_squares_of_all_singular_values_sum_to(make):
    statistic, data = make(), tokens()
    matrix = exact(statistic, *data)
    is_gradient = isinstance(statistic, GradientStatistic)  # else of those of centred inputs
    want = matrix.square().sum() if is_gradient else matrix.trace()
    assert filled(statistic, data).energy() == pytest.approx(want.item(), rel=make.energy)


def test_without_data_everything_is_zero_and_vectors_are_finite(make):
    with_sums = make()
    with_sums.sums(CPU)
    for statistic in (make(), with_sums):
        U, S, Vh = read(statistic)
        assert torch.equal(S, torch.zeros(RANK))
        for side in (U.T, Vh):
            torch.testing.assert_close(side @ side.T, torch.eye(RANK), atol=1e-5, rtol=0)
        assert not any(mean.any() for mean in means(statistic).values())
        assert (statistic.energy(), statistic.weight, statistic.n_calls) == (0.0, 0.0, 0)


@pytest.mark.parametrize("scale", [0.0, 1e-6, 1e6])
def test_any_scale_of_the_data_gives_finite_and_proportional_results(make, scale):
    x, dy = tokens()
    plain, scaled = read(filled(make(), (x, dy))), read(filled(make(), (x * scale, dy * scale)))
    assert all(torch.isfinite(part).all() for part in scaled)
    torch.testing.assert_close(scaled.S, plain.S * scale**2, rtol=PRODUCT, atol=0)
    if scale:
        assert same_subspace(scaled.U, plain.U) > 1 - PRODUCT


@pytest.mark.parametrize("n", [1, 2, 3])
def test_fewer_tokens_than_the_rank_give_no_more_directions_than_they_span(make, n):
    statistic = filled(make(), tokens(n))
    statistic.orient()
    U, S, Vh = read(statistic)
    for side in (U.T, Vh):
        torch.testing.assert_close(side @ side.T, torch.eye(RANK), atol=PRODUCT, rtol=0)
    spanned = n - getattr(statistic, "centered", False)
    # Beyond a sum's roundings there are those of the factors; on one machine 2.7e-5 is left in one row.
    assert (S[spanned:] < PRODUCT * read(filled(make(), tokens())).S[0]).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_shows_in_the_energy(make, value):
    x, dy = tokens()
    x[3, 4] = value
    for parts in ([(x, dy)], [tokens(), (x, dy)]):
        assert not filled(make(), *parts).energy() < float("inf")


# --- sums ----------------------------------------------------------------------------------------


def test_merging_in_any_order_gives_what_one_accumulator_of_all_gives(make):
    data = split([7, 93, 30, 70], tokens())
    for parts in ([data[:1], data[1:3], data[3:]], [data[:2], data[2:]]):
        merged, *others = (filled(make(), *batches) for batches in parts[::-1])
        before = [copies(other) for other in others]

        for other in others:
            merged.merge(other)

        assert_same(merged, filled(make(), *data))
        assert merged.n_calls == 4
        for other, tensors in zip(others, before, strict=True):
            assert_untouched(other, tensors)


def test_empty_accumulators_change_nothing(make):
    whole, zeros, cleared = filled(make(), tokens()), make(), filled(make(), tokens(9))
    zeros.sums(CPU)
    cleared.clear()
    for empty in (make(), zeros, cleared):
        before = copies(whole)
        whole.merge(empty)
        assert_untouched(whole, before)
        empty.merge(whole)
        assert_same(empty, whole)
        assert empty.n_calls == whole.n_calls == 1


def test_adding_the_sums_about_one_point_is_merging(make):
    # What processes do, of which the first has seen nothing.
    parts = [make(), *(filled(make(), part) for part in split([60, 140], tokens()))]
    if (point := parts[1].point(CPU)) is not None:
        for part in parts:
            part.move_to(point)
    for other in parts[1:]:
        for mine, theirs in zip(parts[0].sums(CPU), other.sums(CPU), strict=True):
            mine += theirs
        parts[0].weight += other.weight
    assert_same(parts[0], filled(make(), tokens()))


def test_neither_order_nor_split_nor_shape_of_the_tokens_matters(make):
    x, dy = tokens()
    at_once, none = filled(make(), (x, dy)), (x[:0], dy[:0])
    order = torch.randperm(N_TOKENS, generator=torch.Generator().manual_seed(3))

    in_parts = filled(make(), *split([1, 7, 122, 70], (x[order], dy[order])))
    with_none = filled(make(), none, (x, dy), none)
    folded = filled(make(), (x.reshape(5, 4, 10, IN), dy.reshape(5, 4, 10, OUT)))

    assert_same(in_parts, at_once)
    assert_same(with_none, at_once, BITS)
    assert_same(folded, at_once, 1e-7)
    assert (in_parts.n_calls, with_none.n_calls, folded.n_calls) == (4, 3, 1)


def test_a_cleared_accumulator_measures_anew_in_the_same_way(make):
    statistic = filled(make(), tokens(seed=5))
    statistic.orient()
    test = [t.clone() for t in statistic.oriented()]
    statistic.clear()
    assert (statistic.energy(), statistic.weight, statistic.n_calls) == (0.0, 0.0, 0)
    assert all(torch.equal(a, b) for a, b in zip(statistic.oriented(), test, strict=True))
    data = few_directions()
    assert relative_error(read(filled(statistic, data)).matrix(), exact(statistic, *data)) < PRODUCT


def test_orienting_keeps_what_was_summed_and_the_sum_goes_on(make):
    data, more = few_directions(), few_directions(seed=2)
    statistic = filled(make(), *split([60, 140], data))
    statistic.orient()
    assert (statistic.weight, statistic.n_calls) == (N_TOKENS, 2)
    assert relative_error(read(statistic).matrix(), exact(statistic, *data)) < PRODUCT
    both = map(torch.cat, zip(data, more, strict=True))
    assert relative_error(read(filled(statistic, more)).matrix(), exact(statistic, *both)) < PRODUCT


def test_orienting_changes_something_only_where_there_is_something_to_orient(make):
    statistic = make()
    statistic.orient()
    assert bool(statistic.tensors()) == make.oriented  # nothing from nothing
    before = copies(filled(statistic, tokens()))
    statistic.orient()
    assert bool(statistic.oriented()) == statistic.can_orient
    if not statistic.can_orient:
        assert_untouched(statistic, before)


# --- weights -------------------------------------------------------------------------------------


def weighed(make, x, dy, weight=1.0, count=1.0):
    statistic = make()
    statistic.add(x, dy, weight)
    statistic.count(count)
    return statistic


def test_a_loss_scale_that_the_weight_divides_out_does_not_matter(gradient):
    x, dy = tokens()
    scale = 2.0**12
    assert_same(weighed(gradient, x, dy * scale, 1 / scale), weighed(gradient, x, dy))


def test_batches_are_averaged_by_their_weights(gradient):
    (x, dy), (x2, dy2) = few_directions(), few_directions(seed=2)
    statistic = weighed(gradient, x, dy, 30.0, 30.0)
    statistic.merge(weighed(gradient, x2, dy2, 10.0, 10.0))
    want = (30 * dy.T @ x + 10 * dy2.T @ x2) / 40
    assert relative_error(read(statistic).matrix(), want) < PRODUCT


def test_reading_the_same_data_twice_leaves_the_mean_alone(make):
    once, twice = filled(make(), tokens()), filled(make(), tokens(), tokens())
    assert_same_means(twice, once)
    assert twice.energy() == pytest.approx(once.energy(), rel=SUM)


def test_a_layer_used_twice_in_a_batch_sums_its_uses(gradient):
    # The weight of a batch is counted once, however often the layer runs in it.
    x, dy = few_directions()
    statistic = weighed(gradient, x, dy)
    statistic.add(x, dy)
    assert statistic.n_calls == 2
    assert relative_error(read(statistic).matrix(), 2 * dy.T @ x) < PRODUCT


def test_rows_without_output_gradient_do_not_matter(gradient):
    x, dy = tokens()
    padded = torch.cat([x, 100 * torch.randn(40, IN)]), torch.cat([dy, torch.zeros(40, OUT)])
    assert_same(weighed(gradient, *padded), weighed(gradient, x, dy))


# --- precision -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_the_state_is_float32_and_products_too_whatever_the_data(make, dtype):
    x, dy = (t.to(dtype) for t in tokens())
    statistic = filled(make(), (x, dy))
    assert {t.dtype for t in statistic.tensors().values()} == {torch.float32}
    # float() of the data is all that may be rounded: the sums are bit for bit the same.
    assert_same(statistic, filled(make(), (x.float(), dy.float())), BITS)


def test_many_small_bfloat16_contributions_are_not_lost(make):
    # A bfloat16 sum stops growing once it is 256 times its increments.
    data = tuple(t[:4].bfloat16() for t in tokens())
    many = filled(make(), *[data] * 400)
    # 400 float32 additions of equal terms: at most 400 roundings of 6e-8.
    assert_same_means(many, filled(make(), data), 2.4e-5)
    assert (many.weight, many.n_calls) == (1600, 400)


# --- state ---------------------------------------------------------------------------------------


def test_the_state_survives_a_file_and_the_sum_goes_on(make, tmp_path):
    first, second = split([60, 140], tokens())
    original, restored = filled(make(), first), filled(make(), second)
    state = {k: torch.as_tensor(v) for k, v in original.state_dict().items()}
    save_file(state, tmp_path / "state.safetensors")

    restored.load_state_dict(load_file(tmp_path / "state.safetensors"))  # forgets what was there

    assert restored.n_bytes() == original.n_bytes()
    assert_same(filled(restored, second), filled(original, second), BITS)
    assert (restored.energy(), restored.n_calls) == (original.energy(), 2)
    restored.load_state_dict(make().state_dict())
    assert (restored.energy(), restored.weight, restored.n_calls) == (0.0, 0.0, 0)


@pytest.mark.parametrize("way", ["merge", "copy", "load"])
def test_what_takes_over_the_sums_shares_none_of_their_memory(make, way):
    source, target = filled(make(), tokens()), make()
    if way == "copy":
        target = source.copy()
    elif way == "load":
        target.load_state_dict(source.state_dict())
    else:
        target.merge(source)
    assert_same(target, source, BITS)

    before = copies(source)
    filled(target, tokens(seed=4)).orient()
    assert_untouched(source, before)

    before = copies(target)
    filled(source, tokens(seed=4)).orient()
    assert_untouched(target, before)


def test_n_bytes_is_what_the_tensors_hold(make):
    statistic = filled(make(), tokens())
    for _ in range(2):
        tensors = statistic.tensors().values()
        assert statistic.n_bytes() == sum(4 * t.numel() for t in tensors) > 0
        # No tensor hides more memory behind a view.
        assert statistic.n_bytes() == sum(t.untyped_storage().nbytes() for t in tensors)
        statistic.orient()


def test_accumulating_is_without_gradients_and_touches_neither_data_nor_the_generator(make):
    x, dy = tokens()
    given, before = (x.clone().requires_grad_(), dy.clone()), torch.get_rng_state()
    statistic = filled(make(), given)
    statistic.orient()
    read(statistic)
    assert not any(t.requires_grad for t in statistic.tensors().values())
    assert torch.equal(given[0], x)
    assert torch.equal(given[1], dy)
    assert torch.equal(torch.get_rng_state(), before)


# --- refusals ------------------------------------------------------------------------------------


def assert_refuses(mine, other, *differences):
    """Merging fails with both descriptions, which name the differences, and changes nothing."""
    assert all(value in other.describe() for value in differences)
    before = copies(mine)
    with pytest.raises(ShapeError, match="orient all of them from the same data") as caught:
        mine.merge(other)
    assert f"cannot merge {other.describe()} into {mine.describe()}; " in str(caught.value)
    assert_untouched(mine, before)
    assert (mine.weight, mine.n_calls) == (N_TOKENS, 1)


def test_another_kind_centring_or_orientation_is_refused(make):
    for row in ROWS.values():
        mine, other = filled(make(), tokens()), filled(row(), tokens())
        if row is not make:
            assert mine.describe() != other.describe()
            assert_refuses(mine, other, type(other).__name__)


@pytest.mark.parametrize("change", [{"in_features": 120}, {"width": 64}, {"seed": 1}], ids=str)
def test_another_shape_width_or_seed_is_refused(make, change):
    ((name, value),) = change.items()
    if make().can_orient or name == "in_features":
        difference = str(value) if name == "in_features" else f"{name} {value}"
        assert_refuses(filled(make(), tokens()), make(**change), difference)


def test_parts_must_share_what_is_oriented_to_be_merged(make):
    mine = filled(make(), tokens())
    assert len(mine.oriented()) == make.oriented * len(mine.oriented_names)
    if make.oriented:
        assert_refuses(mine, filled(make(pilot=8), tokens()), "oriented True")
    for i in range(len(mine.oriented())):
        other = make()
        other.oriented()[i][0, 0] += 1
        assert_refuses(mine, other)
