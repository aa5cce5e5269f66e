"""PiSSA: the best approximation of the weight is what starts to train, as in PEFT."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_gradinit import PiSSAConfig
from peft_gradinit.errors import ConfigError
from peft_gradinit.linalg import truncated_svd
from peft_gradinit.methods.pissa import pissa_factors
from tests.helpers import (
    SVD_TOLERANCE,
    logits,
    matrix_with_spectrum,
    pico_gpt2,
    pico_llama,
    relative_error,
    train_steps,
)
from tests.methods.weight_starts import (
    ALPHA,
    R,
    best_approximation,
    products,
    started,
    taken_by_peft,
    weights,
)

every_model = pytest.mark.parametrize("make", [pico_llama, pico_gpt2], ids=["llama", "gpt2"])

RANDOM_WEIGHTS = 1e-4
"""Relative error of leading triplets of random weights in float32: rounding over the gap to the
next singular value, which is some hundredths; measured 4e-5."""

# The formula -------------------------------------------------------------------------------------


@pytest.mark.parametrize("scaling", [0.25, 1.0, 7.0])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30), (16, 16)])
@pytest.mark.parametrize("r", [1, 5, 16])
def test_the_product_is_the_best_approximation_of_the_weight_for_every_scaling(shape, r, scaling):
    W = matrix_with_spectrum(*shape, torch.linspace(3, 0.5, min(shape)))
    A0, B0 = pissa_factors(truncated_svd(W, r), scaling=scaling)
    assert (A0.shape, B0.shape) == ((r, shape[1]), (shape[0], r))
    product = scaling * (B0 @ A0)
    assert relative_error(product, best_approximation(W, r)) <= 1e-12  # float64
    left = torch.linalg.svdvals(W)[r:].norm()  # no matrix of rank r comes nearer
    assert (W - product).norm().item() == pytest.approx(left.item(), abs=1e-12)


def test_both_factors_carry_the_root_of_the_singular_values_over_the_scaling():
    W = matrix_with_spectrum(30, 20, torch.linspace(3, 0.5, 20))
    A0, B0 = pissa_factors(truncated_svd(W, 5), scaling=2.0)
    want = torch.diag(torch.linspace(3, 0.5, 20)[:5].double() / 2)
    assert torch.allclose(A0 @ A0.T, want, atol=1e-6)  # the spectrum was given in float32
    assert torch.allclose(B0.T @ B0, want, atol=1e-6)


# The papers claim, and PEFT ----------------------------------------------------------------------


def test_it_learns_faster_than_plain_lora_at_the_same_rate():
    def last_losses(config):
        return train_steps(get_peft_model(pico_llama(), config), 12, lr=1e-3)[-3:]

    values = {"r": R, "lora_alpha": ALPHA, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    ours, plain = last_losses(PiSSAConfig(**values)), last_losses(LoraConfig(**values))
    assert all(one < other for one, other in zip(ours, plain, strict=True))


OPTIONS = {
    "llama": (pico_llama, {}),
    "gpt2": (pico_gpt2, {}),
    "rslora": (pico_llama, {"use_rslora": True, "lora_alpha": 3}),
    "patterns": (
        pico_llama,
        {"rank_pattern": {"down_proj": 9}, "alpha_pattern": {"q_proj": 30}},
    ),
}


@pytest.mark.parametrize(("make", "options"), OPTIONS.values(), ids=OPTIONS)
def test_what_is_taken_out_is_what_peft_takes_out(make, options):
    ours = products(started(PiSSAConfig, make(), **options))
    theirs = taken_by_peft(make(), "pissa", **options)
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        assert relative_error(ours[name], want) <= SVD_TOLERANCE, name


# What differs ------------------------------------------------------------------------------------


@every_model
def test_the_base_is_not_written_where_peft_overwrites_it(make):
    model = make()
    before = weights(model)
    peft_model = started(PiSSAConfig, model)
    assert all(torch.equal(w, before[n]) for n, w in weights(peft_model).items())
    assert all(p.norm() > 0 for p in taken_by_peft(make(), "pissa").values())
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), logits(make()))


@every_model
def test_a_sketch_takes_out_the_same_and_comes_nearer_than_that_of_peft(make):
    """Random weights have the flattest spectra that there are."""
    exact = {n: best_approximation(w, R).float() for n, w in weights(make()).items()}
    ours = products(started(PiSSAConfig, make(), svd="randomized"))
    theirs = taken_by_peft(make(), "pissa_niter_16")
    for name, want in exact.items():
        assert relative_error(ours[name], want) <= RANDOM_WEIGHTS, name
    assert max(relative_error(theirs[n], want) for n, want in exact.items()) > 0.1


def test_a_sketch_does_not_depend_on_the_global_generator():
    found = []
    for seed in (0, 1):
        model = pico_llama(hidden_size=160, intermediate_size=224)  # wider than the sketch
        torch.manual_seed(seed)
        found.append(products(started(PiSSAConfig, model, svd="randomized")))
    assert all(torch.equal(product, found[1][name]) for name, product in found[0].items())


def test_an_unknown_decomposition_is_refused():
    with pytest.raises(ConfigError, match=r"svd must be one of \('exact', 'randomized'\), got 'f'"):
        PiSSAConfig(svd="f")
