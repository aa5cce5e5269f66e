"""The two gradient estimators: exactness, orientation, the estimate of the energy."""

import pytest
import torch

from peft_gradinit.linalg import TestMatrices, draw_test_matrix, reconstruct
from peft_gradinit.statistics import DenseGradient, SketchedGradient, TestMatrixPool
from tests.helpers import relative_error

OUT, IN, RANK, WIDTH = 160, 140, 8, 72


def sketch(seed=0, out_features=OUT):
    return SketchedGradient(out_features, IN, width=WIDTH, seed=seed, pool=TestMatrixPool())


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
    statistic = sketch(out_features=IN)
    statistic.add(x, x)  # a symmetric gradient

    assert relative_error(statistic.tensors()["Y"], statistic.tensors()["Z"]) > 0.5


def test_after_orientation_the_sums_of_the_gaussian_columns_stay_exact():
    batches = list(stream(8))
    statistic = fill(sketch(), batches, orient_after=(2, 5))
    G, n = gradient_of(batches), statistic.n_oriented

    for name, sums, dimension, seed in (("Y", G, IN, 0), ("Z", G.T, OUT, 1)):
        want = (sums @ draw_test_matrix(dimension, WIDTH, seed=seed))[:, n:]
        assert relative_error(statistic.tensors()[name][:, n:], want) < 1e-5


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
