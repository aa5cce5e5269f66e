"""OLoRA: `B` starts orthonormal, from the QR decomposition of the weight, as in PEFT."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_gradinit import OLoRAConfig, pairs
from peft_gradinit.methods.olora import olora_factors
from tests.helpers import logits, pico_gpt2, pico_llama, relative_error, same_subspace
from tests.methods.weight_starts import (
    ALPHA,
    R,
    expected,
    products,
    started,
    taken_by_peft,
    weights,
)

SHAPES = [(30, 20), (20, 30), (16, 16)]
FLOAT32 = 1e-6
"""Relative error between two float32 QR decompositions, which have no gaps to suffer from."""


def random_weight(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The formula -------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [1, 5, 16])
def test_b_is_orthonormal_and_the_first_columns_of_the_product_are_the_weights(shape, r):
    W = random_weight(shape)
    A0, B0 = olora_factors(W, r=r)
    assert (A0.shape, B0.shape) == ((r, shape[1]), (shape[0], r))
    assert torch.allclose(B0.T @ B0, torch.eye(r).double(), atol=1e-12)
    assert torch.allclose((B0 @ A0)[:, :r], W[:, :r], atol=1e-12)
    assert same_subspace(B0, W[:, :r]) >= 1 - 1e-12


@pytest.mark.parametrize("shape", SHAPES)
def test_the_product_projects_the_weight_on_its_first_columns(shape):
    """So that what is left is orthogonal to `B0`, and all of it is taken at full rank."""
    W = random_weight(shape)
    for r in (5, min(shape)):
        A0, B0 = olora_factors(W, r=r)
        assert torch.allclose(B0 @ A0, B0 @ B0.T @ W, atol=1e-12)
    assert torch.allclose(B0 @ A0, W, atol=1e-12)


@pytest.mark.parametrize("shape", SHAPES)
def test_signs_are_canonical_and_the_product_does_not_depend_on_them(shape):
    W = random_weight(shape)
    A0, B0 = olora_factors(W, r=5)
    assert (A0.diagonal() > 0).all()
    assert not A0.tril(-1).any()
    assert torch.allclose(B0 @ A0, expected(OLoRAConfig, W, 5), atol=1e-12)
    other_A0, other_B0 = olora_factors(-W, r=5)
    assert torch.allclose(other_A0, A0, atol=1e-12)
    assert torch.allclose(other_B0, -B0, atol=1e-12)


@pytest.mark.parametrize("W", [torch.zeros(12, 9), torch.outer(torch.arange(12.0), torch.ones(9))])
def test_b_is_orthonormal_for_weights_of_low_rank(W):
    A0, B0 = olora_factors(W, r=5)
    assert torch.allclose(B0.T @ B0, torch.eye(5), atol=1e-6)
    assert torch.allclose(B0 @ A0, B0 @ B0.T @ W, atol=1e-5)


# PEFT --------------------------------------------------------------------------------------------

OPTIONS = {
    "plain": {},
    "rslora": {"use_rslora": True, "lora_alpha": 3},
    "patterns": {"rank_pattern": {"down_proj": 9}, "alpha_pattern": {"q_proj": 30}},
}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_is_taken_out_of_linear_layers_is_what_peft_takes_out(options):
    ours = products(started(OLoRAConfig, pico_llama(), **options))
    theirs = taken_by_peft(pico_llama(), "olora", **options)
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        assert relative_error(ours[name], want) <= FLOAT32, name


def test_b_has_the_scaling_of_the_adapter_beside_it():
    """The paper divides neither factor by it: the product grows with `lora_alpha`."""
    for pair in pairs(started(OLoRAConfig, pico_llama(), lora_alpha=24)):
        ((A0, B0),) = pair.anchors()
        assert pair.scaling == 6
        assert torch.allclose(B0.T @ B0, torch.eye(R), atol=1e-5)
        want = expected(OLoRAConfig, weights(pico_llama())[pair.name], R)
        assert relative_error(B0 @ A0, want) <= 1e-5


def test_conv1d_is_decomposed_as_linear_layers_are_where_peft_takes_the_transpose():
    ours = products(started(OLoRAConfig, pico_gpt2()))
    theirs = taken_by_peft(pico_gpt2(), "olora")
    for name, weight in weights(pico_gpt2()).items():
        want = expected(OLoRAConfig, weight, R, scaling=ALPHA / R)
        stored = expected(OLoRAConfig, weight.T, R, scaling=ALPHA / R)
        assert relative_error(ours[name], want) <= 1e-5, name
        assert relative_error(theirs[name], stored.T) <= 1e-5, name
        assert relative_error(theirs[name], want) > 0.5, name


def test_conv1d_layers_run_where_the_factors_of_peft_do_not_fit():
    assert relative_error(logits(started(OLoRAConfig, pico_gpt2())), logits(pico_gpt2())) <= 1e-5
    config = LoraConfig(init_lora_weights="olora", r=R, target_modules=["c_attn"])
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        logits(get_peft_model(pico_gpt2(), config))
