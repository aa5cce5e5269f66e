"""The two gradient estimators: exactness, orientation, memory, choice of the estimator."""

import pytest
import torch

from peft_gradinit.errors import ShapeError
from peft_gradinit.linalg import TestMatrices, draw_test_matrix, reconstruct
from peft_gradinit.statistics import (
    DenseGradient,
    SketchedGradient,
    TestMatrixPool,
    gradient_statistic,
)
from peft_gradinit.statistics.gradient_sketch import N_RANDOM_COLUMNS
from tests.helpers import relative_error

OUT, IN, RANK, WIDTH = 160, 140, 8, 72


def sketch(width=WIDTH, seed=0, pool=None):
    return SketchedGradient(OUT, IN, width=width, seed=seed, pool=pool or TestMatrixPool())


def chosen(shape, *, rank=RANK, estimator="sketch", sketch_size=None, pool=None):
    return gradient_statistic(
        shape,
        rank=rank,
        estimator=estimator,
        sketch_size=sketch_size,
        seed=0,
        pool=pool or TestMatrixPool(),
    )


def stream(n_batches, seed=0, n_tokens=30):
    """Batches of tokens whose inputs and output gradients decay slowly, as in a real layer."""
    generator = torch.Generator().manual_seed(seed)
    basis = torch.Generator().manual_seed(100)
    decay = torch.arange(1, IN + 1) ** -0.7
    to_x, to_dy = (torch.randn(IN, d, generator=basis) * decay[:, None] for d in (IN, OUT))
    for _ in range(n_batches):
        hidden = torch.randn(n_tokens, IN, generator=generator)
        yield hidden @ to_x, hidden @ to_dy


def gradient_of(batches):
    return sum(dy.T @ x for x, dy in batches)


def error_over_best(G, svd, rank=RANK):
    best = torch.linalg.vector_norm(torch.linalg.svdvals(G)[rank:])
    return ((G - svd.matrix()).norm() / best).item()


def fill(statistic, batches, orient_after=()):
    for i, (x, dy) in enumerate(batches):
        if i in orient_after:
            statistic.orient()
        statistic.add(x, dy)
        statistic.count(1.0)
    return statistic


def test_dense_is_the_gradient_that_autograd_computes():
    layer = torch.nn.Linear(IN, OUT)
    x, target = torch.randn(5, 6, IN), torch.randn(5, 6, OUT)
    out = layer(x)
    loss = (out - target).square().mean()
    G, dy = torch.autograd.grad(loss, [layer.weight, out])

    statistic = DenseGradient(OUT, IN)
    statistic.add(x, dy)
    statistic.count(1.0)

    assert relative_error(statistic.mean(), G) < 1e-6  # the same 30 products in another order


def test_dense_energy_is_exact():
    batches = list(stream(4))

    energy = fill(DenseGradient(OUT, IN), batches).energy()

    assert energy == pytest.approx((gradient_of(batches) / 4).double().square().sum().item(), 1e-5)


def test_the_sketch_is_the_gradient_times_the_test_matrices():
    batches = list(stream(4))
    state = fill(sketch(seed=5), batches).tensors()
    G = gradient_of(batches)

    # Float32 sums of 120 tokens in another order.
    assert relative_error(state["Y"], G @ draw_test_matrix(IN, WIDTH, seed=10)) < 1e-5
    assert relative_error(state["Z"], G.T @ draw_test_matrix(OUT, WIDTH, seed=11)) < 1e-5
    assert state.keys() == {"Y", "Z"}


def test_a_square_layer_has_different_test_matrices_on_its_two_sides():
    x = torch.randn(10, IN)
    statistic = SketchedGradient(IN, IN, width=WIDTH, seed=0, pool=TestMatrixPool())
    statistic.add(x, x)  # a symmetric gradient

    assert relative_error(statistic.tensors()["Y"], statistic.tensors()["Z"]) > 0.5


def test_after_orientation_the_sums_of_the_gaussian_columns_stay_exact():
    batches = list(stream(8))
    statistic = fill(sketch(), batches, orient_after=(2, 5))
    G, n = gradient_of(batches), statistic.n_oriented

    assert (
        relative_error(
            statistic.tensors()["Y"][:, n:], (G @ draw_test_matrix(IN, WIDTH, seed=0))[:, n:]
        )
        < 1e-5
    )
    assert (
        relative_error(
            statistic.tensors()["Z"][:, n:], (G.T @ draw_test_matrix(OUT, WIDTH, seed=1))[:, n:]
        )
        < 1e-5
    )


def test_after_orientation_the_sums_of_the_oriented_columns_are_gradient_times_test_matrix():
    # Exact for a gradient of few directions, of which the reconstruction loses nothing.
    generator = torch.Generator().manual_seed(0)
    to_x, to_dy = (torch.randn(5, d, generator=generator) for d in (IN, OUT))
    hidden = [torch.randn(30, 5, generator=generator) for _ in range(6)]
    batches = [(h @ to_x, h @ to_dy) for h in hidden]

    state = fill(sketch(), batches, orient_after=(2,)).tensors()

    G, n = gradient_of(batches), state["V"].shape[1]
    # Float32, through one least-squares problem.
    assert relative_error(state["Y"][:, :n], G @ state["V"]) < 1e-4
    assert relative_error(state["Z"][:, :n], G.T @ state["U"]) < 1e-4
    for side in (state["V"], state["U"]):
        torch.testing.assert_close(side.T @ side, torch.eye(n), atol=1e-5, rtol=0)


@pytest.mark.parametrize("seed", range(3))
def test_orientation_brings_the_error_near_the_best_possible(seed):
    batches = list(stream(16, seed))
    G = gradient_of(batches) / 16

    random = error_over_best(G, fill(sketch(seed=seed), batches).triplets(RANK))
    turned = fill(sketch(seed=seed), batches, orient_after=(2, 6)).triplets(RANK)

    # 32 of 72 columns oriented after an eighth and three eighths of the data, as the pass does.
    assert error_over_best(G, turned) < 1.05
    assert error_over_best(G, turned) - 1 < 0.5 * (random - 1)


def test_orientation_keeps_weight_and_calls_and_does_nothing_before_the_first_token():
    statistic = sketch()
    statistic.orient()
    assert statistic.tensors() == {}

    fill(statistic, stream(3))
    statistic.orient()
    assert (statistic.weight, statistic.n_calls) == (3.0, 3)


def test_orientation_on_a_zero_gradient_stays_finite_and_sees_what_comes_later():
    batches = [(torch.randn(9, IN), torch.zeros(9, OUT)), *stream(6)]

    statistic = fill(sketch(), batches, orient_after=(1,))

    G = gradient_of(batches) / 7
    svd = statistic.triplets(RANK)
    assert all(torch.isfinite(part).all() for part in svd)
    # The oriented columns are arbitrary then, so this is no better than a random sketch.
    assert error_over_best(G, svd) < 2.0


def test_the_triplets_are_the_reconstruction_from_all_columns():
    batches = list(stream(4))
    G = gradient_of(batches) / 4
    test = TestMatrices(draw_test_matrix(IN, WIDTH, seed=0), draw_test_matrix(OUT, WIDTH, seed=1))

    want = reconstruct(G @ test.Omega, G.T @ test.Psi, test, RANK)

    assert relative_error(fill(sketch(), batches).triplets(RANK).matrix(), want.matrix()) < 1e-4


@pytest.mark.parametrize("orient_after", [(), (2, 6)], ids=["random", "oriented"])
def test_the_energy_estimate_is_unbiased(orient_after):
    batches = list(stream(16))
    want = (gradient_of(batches) / 16).square().sum().item()

    estimates = [
        fill(sketch(seed=s), batches, orient_after=orient_after).energy() for s in range(8)
    ]

    # One estimate has a standard error of up to 1 / sqrt(40) = 16 %, the mean of eight 6 %.
    assert sum(estimates) / 8 == pytest.approx(want, rel=0.18)
    assert all(e == pytest.approx(want, rel=0.64) for e in estimates)


@pytest.mark.parametrize(
    ("other", "named"),
    [(sketch(seed=1), "seed 1"), (sketch(width=80), "width 80")],
    ids=["seed", "width"],
)
def test_merging_sketches_with_other_test_matrices_is_refused_with_both_values(other, named):
    with pytest.raises(ShapeError, match=rf"width 72, seed 0.*{named}"):
        fill(sketch(), stream(1)).merge(fill(other, stream(1)))


def test_merging_an_oriented_sketch_into_one_that_is_not_is_refused():
    turned = fill(sketch(), stream(2), orient_after=(1,))

    with pytest.raises(ShapeError, match=r"oriented False.*oriented True"):
        fill(sketch(), stream(2)).merge(turned)


def test_merging_sketches_oriented_by_other_data_is_refused():
    one = fill(sketch(), stream(2, seed=0), orient_after=(1,))
    other = fill(sketch(), stream(2, seed=1), orient_after=(1,))

    with pytest.raises(ShapeError, match="orient all of them from the same data"):
        one.merge(other)


def test_at_width_4096_and_rank_16_a_sketch_holds_a_tenth_of_the_gradient_at_most():
    statistic = chosen((4096, 4096), rank=16)
    assert isinstance(statistic, SketchedGradient)
    tenth = 4 * 4096 * 4096 // 10

    statistic.add(torch.randn(3, 4096), torch.randn(3, 4096))
    assert 0 < statistic.n_bytes() <= tenth

    statistic.orient()
    statistic.add(torch.randn(3, 4096), torch.randn(3, 4096))
    assert statistic.tensors().keys() == {"Y", "Z", "V", "U"}
    assert statistic.n_bytes() <= tenth
    # No tensor hides more memory behind a view.
    held = sum(t.untyped_storage().nbytes() for t in statistic.tensors().values())
    assert held == statistic.n_bytes()


def test_a_sketch_of_a_wide_layer_is_cheap_even_without_data():
    # A zero gradient of this shape would be 40 GB.
    statistic = chosen((100_000, 100_000), rank=1, sketch_size=48)

    assert statistic.triplets(1).S.item() == 0.0
    assert statistic.n_bytes() == 0


@pytest.mark.parametrize("rank", [2, 8, 16, 64])
def test_the_default_width_is_twice_the_rank_plus_80(rank):
    assert chosen((4096, 4096), rank=rank).width == 2 * rank + 80


def test_the_width_can_be_chosen():
    assert chosen((4096, 4096), sketch_size=96).width == 96


def test_dense_needs_no_width():
    statistic = chosen((4096, 4096), estimator="dense", sketch_size=1)
    assert isinstance(statistic, DenseGradient)


def test_the_oriented_columns_leave_forty_random_ones_and_a_third_at_least():
    for width in (48, 60, 112, 400):
        statistic = sketch(width)
        assert statistic.n_oriented == min(width - 40, 2 * width // 3)
        assert statistic.width - statistic.n_oriented >= N_RANDOM_COLUMNS == 40


def test_dense_is_chosen_when_asked_for_or_when_it_is_smaller():
    assert isinstance(chosen((4096, 4096), estimator="dense"), DenseGradient)
    # Rank 8: width 96, of which 56 are oriented, is 152 (out + in) floats.
    assert isinstance(chosen((304, 304)), DenseGradient)
    assert isinstance(chosen((305, 305)), SketchedGradient)
    assert isinstance(chosen((16, 100_000)), DenseGradient)


def test_the_estimator_that_is_chosen_never_holds_more_than_the_gradient():
    for out, in_ in [(40, 40), (250, 400), (320, 320), (200, 2000)]:
        statistic = chosen((out, in_))
        statistic.add(torch.randn(2, in_), torch.randn(2, out))
        statistic.orient()
        statistic.add(torch.randn(2, in_), torch.randn(2, out))
        assert statistic.n_bytes() <= 4 * out * in_


@pytest.mark.parametrize(
    ("rank", "size", "least"), [(4, 47, 48), (16, 8, 48), (64, 71, 72)], ids=str
)
def test_a_sketch_size_too_small_for_the_rank_raises_with_the_least_and_the_default(
    rank, size, least
):
    message = rf"sketch_size={size} .* {rank} triplets.* {least}, and {2 * rank + 80} is"
    with pytest.raises(ShapeError, match=message):
        chosen((4096, 4096), rank=rank, sketch_size=size)


@pytest.mark.parametrize("rank", [4, 64])
def test_the_least_sketch_size_works(rank):
    least = max(rank, 40) + 8
    statistic = chosen((400, 300), rank=rank, sketch_size=least)
    assert isinstance(statistic, SketchedGradient)
    for _ in range(2):
        statistic.add(torch.randn(200, 300), torch.randn(200, 400))
        statistic.orient()

    assert statistic.triplets(rank).U.shape == (400, rank)


def test_layers_of_a_pass_share_their_test_matrices():
    pool = TestMatrixPool()
    layers = [chosen(shape, pool=pool) for shape in [(512, 384), (512, 384), (640, 384)]]
    for layer in layers:
        layer.add(torch.randn(2, 384), torch.randn(2, layer.shape[0]))

    Omega = {layer._random("cpu").Omega.data_ptr() for layer in layers}
    Psi = {layer._random("cpu").Psi.data_ptr() for layer in layers}
    assert (len(Omega), len(Psi)) == (1, 2)  # one input width; two output widths


def test_a_pool_gives_the_same_tensor_for_the_same_request_and_another_for_another():
    pool = TestMatrixPool()
    first = pool.get(50, 16, 3, "cpu")

    assert pool.get(50, 16, 3, torch.device("cpu")) is first
    assert torch.equal(first, draw_test_matrix(50, 16, seed=3))
    for request in [(51, 16, 3), (50, 17, 3), (50, 16, 4)]:
        assert pool.get(*request, "cpu") is not first


def test_triplets_take_the_noise_of_the_leading_directions_out_of_the_energy():
    """72 columns a side: without triplets a matrix of stable rank 1 is known to about 20 %."""
    x, dy = torch.randn(200, IN), torch.randn(200, OUT)
    x[:, 0] *= 30
    dy[:, 0] += x[:, 0]
    plain, refined = [], []
    for seed in range(5):
        statistic = sketch(seed=seed)
        fill(statistic, [(x, dy)])
        want = gradient_of([(x, dy)]).square().sum().item()
        plain.append(abs(statistic.energy() / want - 1))
        refined.append(abs(statistic.energy(statistic.triplets(RANK)) / want - 1))
    # What is left is noise of the difference, a few thousandths of the energy here.
    assert max(refined) < 0.02 < max(plain)
