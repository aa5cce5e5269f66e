"""Options of a framework and of ours become a config."""

import pytest

from peft_gradinit import METHODS
from peft_gradinit.errors import ConfigError
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


def test_options_of_ours_win_and_unknown_ones_are_told():
    config = deferred_config("lora_ga", OF_FRAMEWORK, {"scale": "lora", "lora_alpha": 16})
    assert (config.scale, config.lora_alpha) == ("lora", 16)
    with pytest.raises(ConfigError, match="has 'scal'; did you mean 'scale'"):
        deferred_config("lora_ga", OF_FRAMEWORK, {"scal": "lora"})
    with pytest.raises(ConfigError, match=r"method must be one of .*'eva'.*, got 'lora'"):
        deferred_config("lora", OF_FRAMEWORK, {})
    with pytest.raises(ConfigError, match="SVFitConfig has no lora_dropout, use_rslora"):
        deferred_config("svfit", {**OF_FRAMEWORK, "lora_dropout": 0.1, "use_rslora": True}, {})
