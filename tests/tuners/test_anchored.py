"""The anchored pair: constant, concatenated, and split again by rank."""

import torch

from peft_gradinit.tuners.anchored import join, split
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


def test_split_undoes_join():
    r, A, B = 3, torch.randn(3, 5), torch.randn(7, 3)
    live = {
        "m.lora_A.parametrizations.weight.original": A,
        "m.lora_A.parametrizations.weight.0.anchor": A + 1,
        "m.lora_B.parametrizations.weight.original": B,
        "m.lora_B.parametrizations.weight.0.anchor": B + 1,
        "m.lora_B.bias": torch.randn(7),
        "e.lora_embedding_A": torch.randn(3, 9),
        "e.lora_embedding_B": torch.randn(4, 3),
    }
    file = join(live, {"m": 1})
    assert file["m.lora_A.weight"].shape == (2 * r, 5)
    assert file["m.lora_B.weight"].shape == (7, 2 * r)
    assert file["e.lora_embedding_A"].shape == (2 * r, 9)
    back = split(file, {"m": (r, 1)})
    assert back.keys() == live.keys()
    assert all(torch.equal(back[k], v) for k, v in live.items())
