"""Options of a framework and of ours become a config."""

import pytest

from peft_gradinit import METHODS, LoraGAConfig
from peft_gradinit.errors import ConfigError
from peft_gradinit.integrations.loading import continued
from peft_gradinit.integrations.options import deferred_config
from tests.helpers import adapted, pico_llama

OF_FRAMEWORK = {
    "r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "modules_to_save": None,
    "target_modules": ["q_proj"], "task_type": "CAUSAL_LM",
}  # fmt: skip


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.name)
def test_every_method_has_its_config(kind):
    config = deferred_config(kind.name, OF_FRAMEWORK, {"seed": 1})
    assert type(config) is kind
    assert (config.r, config.target_modules) == (4, {"q_proj"})
    assert getattr(config, "lora_alpha", 8) == 8
    assert getattr(config, "is_deferred", False) == (kind.needed() != "nothing")
    assert adapted(pico_llama(), config).peft_config["default"] is config


def test_zero_and_false_are_given_where_the_default_is_another():
    config = deferred_config("lora_ga", {**OF_FRAMEWORK, "layers_to_transform": 0}, {})
    assert config.layers_to_transform == 0
    with pytest.raises(ConfigError, match="init_lora_weights"):
        deferred_config("pissa", {**OF_FRAMEWORK, "init_lora_weights": False}, {})


@pytest.mark.parametrize("is_trainable", [True, False])
def test_a_continued_adapter_has_the_name_that_was_asked_for(is_trainable, tmp_path):
    adapted(pico_llama()).save_pretrained(tmp_path)
    options = {"adapter_name": "other", "torch_device": "cpu"}
    model = continued(pico_llama(), str(tmp_path), is_trainable=is_trainable, **options)
    assert list(model.peft_config) == ["other"]
    assert isinstance(model.peft_config["other"], LoraGAConfig) == is_trainable


def test_options_of_ours_win_and_unknown_ones_are_told():
    config = deferred_config("lora_ga", OF_FRAMEWORK, {"scale": "lora", "lora_alpha": 16})
    assert (config.scale, config.lora_alpha) == ("lora", 16)
    with pytest.raises(ConfigError, match="has 'scal'; did you mean 'scale'"):
        deferred_config("lora_ga", OF_FRAMEWORK, {"scal": "lora"})
    with pytest.raises(ConfigError, match=r"method must be one of .*'eva'.*, got 'lora'"):
        deferred_config("lora", OF_FRAMEWORK, {})
    with pytest.raises(ConfigError, match="SVFitConfig has no lora_dropout, use_rslora"):
        deferred_config("svfit", {**OF_FRAMEWORK, "lora_dropout": 0.1, "use_rslora": True}, {})
