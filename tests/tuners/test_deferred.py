"""Layers held until they have their start: only a training step is refused."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from peft_gradinit.errors import NotInitializedError
from peft_gradinit.tuners.lora.deferred import defer, is_deferred, mark_started


def held():
    model = nn.Sequential(nn.Linear(6, 5))
    peft_model = get_peft_model(model, LoraConfig(target_modules=["0"]))
    peft_model.add_adapter("second", LoraConfig(target_modules=["0"]))
    layer = peft_model.base_model.model[0]
    defer(layer, "default")
    return peft_model.train(), layer


def test_a_training_step_is_refused_and_evaluation_is_not():
    peft_model, _ = held()
    x = torch.randn(3, 6)
    with pytest.raises(NotInitializedError, match="calibration='deferred' and has no start yet"):
        peft_model(x)
    with torch.no_grad():
        peft_model(x)
    peft_model.eval()(x)


def test_frozen_factors_may_run_in_train_mode():
    peft_model, layer = held()
    layer.lora_A.requires_grad_(False)
    peft_model(torch.randn(3, 6))


def test_another_active_adapter_trains_while_one_is_held():
    peft_model, layer = held()
    assert (is_deferred(layer, "default"), is_deferred(layer, "second")) == (True, False)
    peft_model.set_adapter("second")
    peft_model(torch.randn(3, 6)).sum().backward()


def test_released_it_trains_and_leaves_no_trace():
    peft_model, layer = held()
    mark_started(layer, "default")
    mark_started(layer, "default")  # twice is once
    assert not is_deferred(layer, "default")
    assert not layer.lora_A["default"]._forward_pre_hooks
    peft_model(torch.randn(3, 6)).sum().backward()


def test_modules_without_the_adapter_are_none_of_its_business():
    for module in (nn.Linear(2, 2), held()[1]):
        mark_started(module, "unknown")
        assert not is_deferred(module, "unknown")
