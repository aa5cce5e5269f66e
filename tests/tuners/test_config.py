"""Configs share their data with copies and never drag them along."""

import copy
import dataclasses
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig

from peft_gradinit import Calibration, LoraGAConfig
from peft_gradinit.errors import ConfigError
from peft_gradinit.methods import METHODS
from tests.helpers import (
    adapted,
    lora_ga,
    pico_llama,
    quiet,
    token_batches,
)

RECIPES = (
    *("lora_ga/llama2_metamath", "lora_one/llama2_metamath", "eva/llama2_metamath"),
    *("corda/llama2_metamath", "pissa/llama2_metamath", "milora/llama2_metamath"),
    *("olora/tinyllama_alpaca", "svfit/roberta_base_cola"),
)
PAPERS = [Path(__file__).parents[2] / "configs" / f"{name}.yaml" for name in RECIPES]


class Immovable:
    """Data that must be neither copied nor pickled nor printed."""

    def __iter__(self):
        return iter(token_batches())

    def _refuse(self, *args):
        raise AssertionError("the calibration data were dragged along")

    __deepcopy__ = __copy__ = __reduce_ex__ = __repr__ = __eq__ = _refuse
    __hash__ = object.__hash__


@pytest.mark.parametrize("wrapped", [False, True])
def test_config_shares_its_data_with_copies_and_shows_them_nowhere(wrapped):
    data = Immovable()
    config = lora_ga(calibration=quiet(data) if wrapped else data)
    for other in (copy.copy(config), copy.deepcopy(config), dataclasses.replace(config)):
        assert other == config
        assert other.calibration.data is data
    assert repr(config) == repr(lora_ga(calibration="deferred"))
    assert "calibration" not in config.to_dict()
    assert "calibration" not in dataclasses.asdict(config)
    assert dataclasses.replace(config, r=7).r == 7
    assert config != dataclasses.replace(config, direction="ArBr")
    assert config == lora_ga(calibration="deferred"), "the data are no part of the method"
    peft_model = adapted(pico_llama(), dataclasses.replace(config, calibration=quiet(data)))
    copy.deepcopy(peft_model)


def test_replace_can_change_the_calibration():
    config = dataclasses.replace(lora_ga(), calibration="deferred")
    assert config.is_deferred
    assert not dataclasses.replace(config, calibration=quiet(token_batches())).is_deferred


def test_config_is_a_lora_config_and_takes_tensors_and_arrays_as_data():
    assert isinstance(lora_ga(), LoraConfig)
    data = torch.arange(6).reshape(2, 3).numpy()  # `data == "deferred"` would be an array
    assert isinstance(LoraGAConfig(calibration=data).calibration, Calibration)


@pytest.mark.parametrize("word", ["defered", "deffered", "Deferred", "differed"])
def test_a_misspelt_deferred_gets_the_word(word):
    with pytest.raises(ConfigError, match=f"no calibration at {word!r}; did you mean 'deferred'"):
        lora_ga(calibration=word)


def test_activated_lora_is_refused():
    with pytest.raises(ConfigError, match="start would be of all tokens, not of the activated"):
        lora_ga(alora_invocation_tokens=[1, 2])


@pytest.mark.parametrize("path", PAPERS, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_the_setting_of_a_paper_is_one_word(path):
    """It is that of the paper's recipe; options that are given win."""
    method = yaml.safe_load(path.read_text())["method"]
    config_cls = next(m for m in METHODS if m.name == method["name"])
    config = config_cls.as_in_paper()
    given = {k: v for k, v in method.items() if k not in ("name", "options", "target_modules")}
    for name, value in {**given, **method.get("options", {})}.items():
        assert getattr(config, name) == value, name
    assert config_cls.as_in_paper(r=3).r == 3
