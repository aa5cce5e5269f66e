"""LoRA-Muon: the paper's step, and what it is for the product."""

import math
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import ViTConfig, ViTModel

from peft_gradinit import pairs
from peft_gradinit.errors import ConfigError
from peft_gradinit.optim import LoraMuon
from tests.helpers import pico_llama, token_batches
from tests.optim.rows import EXACT, toy
from tests.optim.single import IN, OUT, S, close, gradient, single, steps

ETA, BETA, DECAY = 0.05, 0.8, 0.3


def sign(X):
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh


def inverse_root(gram):
    values, vectors = torch.linalg.eigh(gram)
    return vectors @ torch.diag(values**-0.5) @ vectors.T


def papers_steps(n, *, nesterov):
    """The paper's formulas, in our letters; the unit of the rate is departure 1."""
    _, pair = single()
    A, B = pair.A.detach().clone(), pair.B.detach().clone()
    mA, mB = torch.zeros_like(A), torch.zeros_like(B)
    eta = ETA * math.sqrt(OUT / IN) / S
    found = []
    for step in range(n):
        g = gradient(step)
        gA, gB = S * B.T @ g, S * g @ A.T
        mA, mB = BETA * mA + (1 - BETA) * gA, BETA * mB + (1 - BETA) * gB
        lA = BETA * mA + (1 - BETA) * gA if nesterov else mA
        lB = BETA * mB + (1 - BETA) * gB if nesterov else mB
        RA, RB = inverse_root(A @ A.T), inverse_root(B.T @ B)
        dB = -eta / 2 * sign(lB @ RA) @ RA
        dA = -eta / 2 * RB @ sign(RB @ lA)
        s = math.sqrt(1 - DECAY * ETA)
        A, B = s * A + dA / s, s * B + dB / s
        found.append((A, B))
    return found


@pytest.mark.parametrize("nesterov", [False, True])
def test_steps_are_the_papers(nesterov):
    model, pair = single()
    options = {"momentum": BETA, "nesterov": nesterov, "dampening": EXACT}
    optimizer = LoraMuon(model, lr=ETA, weight_decay=DECAY, **options)
    want = papers_steps(4, nesterov=nesterov)
    for got, expected in zip(steps(optimizer, pair, 4)[1:], want, strict=True):
        close(got, expected)


def test_each_half_moves_the_weight_by_half_the_rate():
    """In the norm from root mean square to root mean square, whatever gradient, rank and scaling."""
    model, pair = single()
    (A, B), (newA, newB) = steps(LoraMuon(model, lr=ETA, dampening=EXACT), pair, 1)
    unit = math.sqrt(OUT / IN)
    for half in (S * (newB - B) @ A, S * B @ (newA - A)):
        values = torch.linalg.svdvals(half)[:3] / unit
        torch.testing.assert_close(values, torch.full_like(values, ETA / 2))


class Outer(nn.Module):
    """A wrapper that says nothing of what it holds, as DDP does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


@pytest.mark.parametrize("wrap", [lambda model: model, Outer], ids=["bare", "wrapped"])
@pytest.mark.parametrize("tie", [False, True])
def test_steps_of_the_output_layer_do_not_grow_with_the_vocabulary(wrap, tie):
    base = pico_llama(vocab_size=320, tie_word_embeddings=tie)
    config = LoraConfig(r=4, target_modules=["up_proj", "lm_head"], ensure_weight_tying=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied layers
        model = get_peft_model(base, config)
    optimizer = LoraMuon(wrap(model), lr=ETA, dampening=EXACT)
    before = {pair.name: (pair.scaling * pair.B @ pair.A).detach() for pair in pairs(model)}
    batch = token_batches(1)[0]
    model(**batch).loss.backward()

    optimizer.step()  # B = 0, so that only its half moves

    for pair in pairs(model):
        moved = (pair.scaling * pair.B @ pair.A).detach() - before[pair.name]
        is_output = pair.name.endswith("lm_head")
        unit = 1.0 if is_output else math.sqrt(moved.shape[0] / moved.shape[1])
        got = torch.linalg.matrix_norm(moved, 2).item()
        assert got == pytest.approx(ETA / 2 * unit, rel=1e-3), pair.name
    assert sum(optimizer.param_groups[0]["outputs"]) == 1


def test_the_output_layer_is_found_behind_an_encoder():
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.images = ViTModel(
                ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
            )
            self.text = pico_llama(vocab_size=320, tie_word_embeddings=False)

    config = LoraConfig(r=4, target_modules=["up_proj", "lm_head", "query"])
    model = get_peft_model(Both(), config)
    (group,) = LoraMuon(model, lr=ETA).param_groups
    names = [pair.name for pair in pairs(model)]
    found = [name for name, given in zip(names, group["outputs"], strict=True) if given]
    assert found == ["text.lm_head"]


@pytest.mark.parametrize("side", ["A", "B"])
def test_the_product_decays_alike_if_one_factor_is_frozen(side):
    model, pair = single()
    getattr(pair, side).requires_grad_(False)
    before = pair.B.detach() @ pair.A.detach()
    optimizer = LoraMuon(model, lr=0.1, weight_decay=0.5)
    moving = pair.B if side == "A" else pair.A
    moving.grad = torch.zeros_like(moving)
    optimizer.step()
    torch.testing.assert_close(pair.B.detach() @ pair.A.detach(), 0.95 * before)


def test_state_of_before_the_output_layer_was_told_apart_is_read():
    model, pair = single()
    optimizer = LoraMuon(model, lr=ETA)
    steps(optimizer, pair, 1)
    state = optimizer.state_dict()
    del state["param_groups"][0]["outputs"]
    again = LoraMuon(model, lr=ETA)
    again.load_state_dict(state)
    steps(again, pair, 1)


def test_decay_beyond_the_product_is_refused():
    with pytest.raises(ConfigError, match=r"lr \* weight_decay must be below 1, got 2.0"):
        LoraMuon(toy(), lr=1.0, weight_decay=2.0)
    model, pair = single()
    optimizer = LoraMuon(model, lr=0.1, weight_decay=2.0)
    optimizer.param_groups[0]["lr"] = 1.0  # a schedule may raise it
    with pytest.raises(ConfigError, match="Lower weight_decay"):
        steps(optimizer, pair, 1)


def test_dampening_bounds_the_step_of_a_factor():
    """With `B` nearly of lower rank, `A` moves at most by `1 / (dampening^(1/2) sigma_1)`."""
    model, pair = single()
    pair.B.data[:, 0] = pair.B.data[:, 1] + 1e-9
    for dampening, bounded in ((1e-4, True), (EXACT, False)):
        (A, B), (newA, _) = steps(LoraMuon(model, lr=ETA, dampening=dampening), pair, 1)
        unit = ETA / 2 * math.sqrt(OUT / IN) / S
        size = torch.linalg.matrix_norm(newA - A, 2) / unit
        bound = 1 / (1e-2 * torch.linalg.matrix_norm(B, 2))
        assert (size <= bound) == bounded
        pair.A.data, pair.B.data = A, B
