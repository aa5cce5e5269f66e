"""The life of a LoRA-GA adapter inside PEFT: inject, disable, switch, delete, merge, unload."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

from peft_gradinit import LoraGAConfig
from tests.helpers import (
    adapted,
    base_weights,
    logits,
    lora_ga,
    pico_gpt2,
    pico_llama,
    relative_error,
    same_weights,
    train_steps,
)

MODELS = [pytest.param(pico_llama, id="llama"), pytest.param(pico_gpt2, id="gpt2-conv1d-tied")]


@pytest.mark.parametrize("make", MODELS)
def test_function_at_step_zero_is_the_base(make):
    before = logits(make())
    assert relative_error(logits(adapted(make())), before) <= 1e-5


@pytest.mark.parametrize("make", MODELS)
def test_base_weights_are_never_written(make, tmp_path):
    model = make()
    before = base_weights(model)
    peft_model = adapted(model)
    train_steps(peft_model)
    peft_model.save_pretrained(tmp_path)
    assert same_weights(before, base_weights(peft_model))


def test_disabled_adapter_is_the_base_bit_for_bit():
    before = logits(pico_llama())
    peft_model = adapted(pico_llama())
    train_steps(peft_model)
    assert not torch.equal(logits(peft_model), before)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), before)


def test_training_lowers_the_loss_and_moves_both_factors():
    peft_model = adapted(pico_llama())
    start = {n: p.clone() for n, p in peft_model.named_parameters() if p.requires_grad}
    losses = train_steps(peft_model, n=9)
    assert losses[-1] < losses[0]
    assert all(not torch.equal(p, start[n]) for n, p in peft_model.named_parameters() if n in start)


@pytest.mark.parametrize("name", ["default", "german"])
def test_saved_adapter_is_plain_lora_on_a_fresh_base(name, tmp_path):
    peft_model = adapted(pico_llama(), name=name)
    train_steps(peft_model)
    peft_model.save_pretrained(tmp_path)
    directory = tmp_path if name == "default" else tmp_path / name
    loaded = PeftModel.from_pretrained(pico_llama(), directory)
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert relative_error(logits(loaded), logits(peft_model)) <= 1e-5


def test_merge_and_unload_gives_the_function_and_unload_the_base():
    peft_model = adapted(pico_llama())
    train_steps(peft_model)
    trained = logits(peft_model)
    assert relative_error(logits(peft_model.merge_and_unload(safe_merge=True)), trained) <= 1e-5
    other = adapted(pico_llama())
    assert torch.equal(logits(other.unload()), logits(pico_llama()))


def test_two_adapters_side_by_side_do_not_disturb_each_other():
    peft_model = adapted(pico_llama())
    train_steps(peft_model)
    first = logits(peft_model)
    peft_model.add_adapter("second", lora_ga(r=3, direction="A2rBr"))
    assert torch.equal(logits(peft_model), first)
    peft_model.set_adapter("second")
    assert relative_error(logits(peft_model), logits(pico_llama())) <= 1e-5
    train_steps(peft_model)
    peft_model.set_adapter("default")
    assert torch.equal(logits(peft_model), first)
    peft_model.delete_adapter("second")
    assert torch.equal(logits(peft_model), first)
    assert list(peft_model.base_model.init_report) == ["default"]


def test_config_without_calibration_raises_and_changes_nothing():
    model = pico_llama()
    modules = [type(m) for m in model.modules()]
    with pytest.raises(ValueError, match="has no calibration"):
        get_peft_model(model, LoraGAConfig(target_modules="all-linear"))
    assert [type(m) for m in model.modules()] == modules
