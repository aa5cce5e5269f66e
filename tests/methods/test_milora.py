"""MiLoRA: the minor part of the weight starts to train, and the principal part is left alone."""

import pytest
import torch

from peft_gradinit import MiLoRAConfig, PiSSAConfig, pairs
from peft_gradinit.linalg import truncated_svd
from peft_gradinit.methods.milora import milora_factors
from tests.helpers import (
    matrix_with_spectrum,
    pico_gpt2,
    pico_llama,
    relative_error,
    token_batches,
)
from tests.methods.weight_starts import (
    R,
    best_approximation,
    expected,
    products,
    started,
    weights,
)

every_model = pytest.mark.parametrize("make", [pico_llama, pico_gpt2], ids=["llama", "gpt2"])


def decomposed(shape, r, scaling=1.0):
    """A weight, and its `s B0 A0`."""
    W = matrix_with_spectrum(*shape, torch.linspace(3, 0.5, min(shape)))
    A0, B0 = milora_factors(truncated_svd(W, min(shape)), r=r, scaling=scaling)
    assert (A0.shape, B0.shape) == ((r, shape[1]), (shape[0], r))
    return W, scaling * (B0 @ A0)


# The formula -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [0.25, 1.0, 7.0])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (16, 16)])
@pytest.mark.parametrize("r", [1, 5, 16])
def test_what_is_left_is_the_best_approximation_of_its_rank_for_every_scaling(shape, r, scaling):
    W, product = decomposed(shape, r, scaling)
    principal = best_approximation(W, min(shape) - r)
    assert (W - product - principal).norm() <= 1e-12 * W.norm()  # float64
    # No other product of rank r that leaves rank min - r is smaller.
    assert product.norm().item() == pytest.approx(torch.linalg.svdvals(W)[-r:].norm().item())


def test_what_is_taken_is_orthogonal_to_what_is_left_on_both_sides():
    W, product = decomposed((30, 20), 5)
    principal = W - product
    assert (principal.T @ product).norm() <= 1e-12
    assert (principal @ product.T).norm() <= 1e-12


def test_factors_carry_the_root_of_the_smallest_singular_values_in_descending_order():
    W = matrix_with_spectrum(30, 20, torch.linspace(3, 0.5, 20))
    A0, B0 = milora_factors(truncated_svd(W, 20), r=5, scaling=2.0)
    want = torch.linspace(3, 0.5, 20)[-5:].double() / 2
    assert torch.allclose(A0.square().sum(1), want, atol=1e-6)  # the spectrum was given in float32
    assert torch.allclose(B0.square().sum(0), want, atol=1e-6)


# Of models; PEFT has no MiLoRA -------------------------------------------------------------------


@every_model
@pytest.mark.parametrize(
    "options",
    [{}, {"use_rslora": True}, {"rank_pattern": {"up_proj": 9, "c_fc": 9}}],
    ids=["plain", "rslora", "patterns"],
)
@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match")
def test_what_is_taken_out_is_the_papers_formula_in_float64(make, options):
    peft_model = started(MiLoRAConfig, make(), **options)
    found, ranks = products(peft_model), {p.name: p.r for p in pairs(peft_model)}
    assert ("rank_pattern" in options) == (set(ranks.values()) == {R, 9})
    for name, weight in weights(make()).items():
        error = (found[name] - expected(MiLoRAConfig, weight, ranks[name])).norm()
        # Float32 rounds by the largest singular value, over the gaps of some hundredths.
        assert error <= 1e-5 * weight.norm(), name


@every_model
def test_the_rest_of_pissa_is_milora(make):
    """In layers whose ranks are such that both together are the whole weight."""
    weight = weights(make())
    full = {name: min(w.shape) for name, w in weight.items()}
    principal = products(started(PiSSAConfig, make()))
    names = {f"^{name}$": full[name] - R for name in full}
    minor = products(started(MiLoRAConfig, make(), r=1, rank_pattern=names))
    for name, want in weight.items():
        assert relative_error(principal[name] + minor[name], want) <= 1e-5, name  # float32


def first_step(config_cls, lr=1e-3):
    """The change of every layer's weight by one SGD step, in its own singular directions."""
    peft_model = started(config_cls, pico_llama())
    peft_model(**token_batches()[0]).loss.backward()
    with torch.no_grad():
        for p in peft_model.parameters():
            if p.grad is not None:
                p -= lr * p.grad
    for name, weight in weights(pico_llama()).items():
        layer = peft_model.base_model.model.get_submodule(name)
        U, _, Vh = torch.linalg.svd(weight, full_matrices=False)
        yield U.T @ layer.get_delta_weight("default").detach() @ Vh.T


def test_training_begins_outside_of_the_principal_directions():
    """The paper's claim: between principal directions nothing moves, to first order in the rate."""
    for minor, principal in zip(first_step(MiLoRAConfig), first_step(PiSSAConfig), strict=True):
        assert minor[:R, :R].norm() <= 1e-2 * minor.norm()
        assert principal[:R, :R].norm() > 0.1 * principal.norm()


# What differs ------------------------------------------------------------------------------------


def test_a_weight_of_low_rank_starts_with_factors_that_hardly_move():
    model = pico_llama()
    projection = model.model.layers[0].self_attn.o_proj
    projection.weight.data = best_approximation(projection.weight.data, 8).float()
    peft_model = started(MiLoRAConfig, model)
    norms = {p.name: p.A.norm().item() for p in pairs(peft_model)}
    low = norms.pop("model.layers.0.self_attn.o_proj")
    assert low <= 1e-2 * min(norms.values())  # the root of float32's rounding
    peft_model(**token_batches()[0]).loss.backward()
    moves = {p.name: p.A.grad.norm() for p in pairs(peft_model)}
    low = moves.pop("model.layers.0.self_attn.o_proj")
    assert low <= 1e-2 * moves["model.layers.1.self_attn.o_proj"]
