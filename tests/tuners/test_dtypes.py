"""Half-precision bases and adapters: the anchor rounds like the factor, so the start stays neutral."""

import pytest
import torch
from peft import get_peft_model

from tests.helpers import adapted, anchors, logits, lora_ga, pico_llama, relative_error

EXACT = 1e-5
"""float32 adapter: `B A - B0 A0` cancels to float32 rounding, whatever the base's dtype."""
BF16 = 2**-8
"""Unit roundoff of bfloat16: the output of each layer is rounded once more than in the base."""


def pico_bf16():
    return pico_llama().to(torch.bfloat16)


def pair(peft_model):
    layer = peft_model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["default"]
    return layer.parametrizations.weight.original, layer.parametrizations.weight[0].anchor


@pytest.mark.parametrize("autocast", [True, False])
def test_bfloat16_base_starts_at_its_own_function(autocast):
    config = lora_ga()
    peft_model = get_peft_model(pico_bf16(), config, autocast_adapter_dtype=autocast)
    original, anchor = pair(peft_model)
    assert original.dtype == (torch.float32 if autocast else torch.bfloat16)
    assert anchor.dtype == torch.float32
    assert torch.equal(original, anchor.to(original.dtype)), "written again after the cast"
    drift = relative_error(logits(peft_model).float(), logits(pico_bf16()).float())
    assert drift <= BF16
    assert peft_model.base_model.init_report["default"].drift <= BF16


def test_added_adapter_is_unrounded_too():
    peft_model = adapted(pico_bf16())
    peft_model.add_adapter("second", lora_ga())
    first, second = anchors(peft_model), anchors(peft_model, "second")
    assert all(torch.equal(first[n][0], second[n][0]) for n in first)
    layer = peft_model.base_model.model.model.layers[0].self_attn.q_proj.lora_A["second"]
    original = layer.parametrizations.weight.original
    assert torch.equal(original, layer.parametrizations.weight[0].anchor)
    peft_model.set_adapter("second")
    drift = relative_error(logits(peft_model).float(), logits(pico_bf16()).float())
    assert drift <= BF16


def cast_like_trl(peft_model):
    for parameter in peft_model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.bfloat16)
    return peft_model


@pytest.mark.parametrize(
    "cast",
    [cast_like_trl, lambda m: m.to(torch.bfloat16)],
    ids=["adapter-only", "whole-model"],
)
def test_casting_the_adapter_to_bfloat16_afterwards_keeps_the_function(cast):
    peft_model = cast(adapted(pico_bf16()))
    assert pair(peft_model)[0].dtype == torch.bfloat16
    with peft_model.disable_adapter():
        base = logits(peft_model).float()
    assert relative_error(logits(peft_model).float(), base) <= BF16


def test_half_precision_model_keeps_the_function():
    peft_model = adapted(pico_llama()).half()
    with peft_model.disable_adapter():
        base = logits(peft_model).float()
    assert relative_error(logits(peft_model).float(), base) <= 2**-11  # unit roundoff of float16


def test_float32_base_starts_exactly():
    peft_model = adapted(pico_llama())
    assert relative_error(logits(peft_model), logits(pico_llama())) <= EXACT
    assert peft_model.base_model.init_report["default"].drift <= EXACT
