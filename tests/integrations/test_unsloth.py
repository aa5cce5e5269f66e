"""A model of unsloth gets its start as plain LoRA, before its kernels take the layers over."""

import pytest
import torch
from peft import LoraModel, get_peft_model

from peft_gradinit import EvaConfig, LoraGAConfig, LoraOneConfig, SVFitConfig
from peft_gradinit.errors import ConfigError
from peft_gradinit.integrations.unsloth import with_start
from tests.helpers import base_weights, logits, pico_llama, same_weights, token_batches, train_steps

TARGETS = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(autouse=True)
def unsloth():
    """unsloth itself refuses to be imported without a GPU."""
    return pytest.importorskip("unsloth", exc_type=(ImportError, NotImplementedError))


@pytest.mark.parametrize("kind", [LoraOneConfig, EvaConfig])
def test_it_is_plain_lora_and_the_same_run(kind):
    live = get_peft_model(pico_llama(), kind(**TARGETS, calibration=token_batches()))
    base = pico_llama()
    before = base_weights(base)
    config = kind(**TARGETS, calibration=token_batches())
    model, rate = with_start(base, config, use_gradient_checkpointing=False)
    assert type(model.base_model) is LoraModel
    assert model._unsloth_gradient_checkpointing is False
    assert same_weights(before, base_weights(model))
    assert 0 < rate.low < rate.suggested < rate.high
    assert torch.equal(logits(model), logits(live))
    assert train_steps(model, 3) == train_steps(live, 3)


def test_what_cannot_work_is_told():
    for config, part in (
        (LoraGAConfig(**TARGETS, calibration=token_batches()), "got LoraGAConfig: unsloth trains"),
        (SVFitConfig(r=4, target_modules=["q_proj"]), "got SVFitConfig"),
        (
            LoraOneConfig(**TARGETS, calibration="deferred"),
            r"needs LoraOneConfig\(calibration=data",
        ),
        (LoraOneConfig(**TARGETS), r"needs LoraOneConfig\(calibration=data"),
    ):
        model = pico_llama()
        with pytest.raises(ConfigError, match=part):
            with_start(model, config)
        assert not hasattr(model, "peft_config")
