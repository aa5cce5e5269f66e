"""The anchored pair: constant, concatenated, and split again by rank."""

import pytest
import torch

from peft_gradinit.tuners.lora.saving import join, split
from tests.helpers import (
    adapted,
    anchors,
    pico_llama,
    train_steps,
)


def test_anchor_holds_the_start_and_training_does_not_move_it():
    peft_model = adapted(pico_llama())
    before = anchors(peft_model)
    train_steps(peft_model)
    for name, (A0, B0) in anchors(peft_model).items():
        assert torch.equal(A0, before[name][0])
        assert torch.equal(B0, before[name][1])


@pytest.mark.parametrize("n", [1, 4])
def test_split_undoes_join(n):
    r, A, B = 3, torch.randn(3 * n, 5), torch.randn(7, 3 * n)
    live = {
        "m.lora_A.parametrizations.weight.original": A,
        "m.lora_A.parametrizations.weight.0.anchor": A + 1,
        "m.lora_B.parametrizations.weight.original": B,
        "m.lora_B.parametrizations.weight.0.anchor": B + 1,
        "m.lora_B.bias": torch.randn(7),
        "e.lora_embedding_A": torch.randn(3, 9),
        "e.lora_embedding_B": torch.randn(4, 3),
    }
    file = join(live, {"m": n})
    assert file["m.lora_A.weight"].shape == (2 * r * n, 5)
    assert file["m.lora_B.weight"].shape == (7, 2 * r * n)
    assert file["e.lora_embedding_A"].shape == (2 * r, 9)
    back = split(file, {"m": (r, n)})
    assert back.keys() == live.keys()
    assert all(torch.equal(back[k], v) for k, v in live.items())


def test_experts_keep_their_own_pairs():
    """The product of each expert, by the rule by which PEFT cuts the factors."""
    r, n = 2, 3
    A, B = torch.randn(n, r, 5), torch.randn(7, r, n)
    A0, B0 = torch.randn(n, r, 5), torch.randn(7, r, n)
    live = {
        "m.lora_A.parametrizations.weight.original": A.flatten(0, 1),
        "m.lora_A.parametrizations.weight.0.anchor": A0.flatten(0, 1),
        "m.lora_B.parametrizations.weight.original": B.flatten(1, 2),
        "m.lora_B.parametrizations.weight.0.anchor": -B0.flatten(1, 2),
    }
    file = join(live, {"m": n})
    cut_A = file["m.lora_A.weight"].reshape(n, 2 * r, 5)
    cut_B = file["m.lora_B.weight"].reshape(7, 2 * r, n)
    for expert in range(n):
        want = B[:, :, expert] @ A[expert] - B0[:, :, expert] @ A0[expert]
        assert torch.allclose(cut_B[:, :, expert] @ cut_A[expert], want, atol=1e-5)
