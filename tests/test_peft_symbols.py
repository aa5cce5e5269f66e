"""Everything of PEFT that the package relies on exists; an upgrade fails here, with its name."""

import importlib
import inspect

import peft
import pytest
import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import Linear
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer

SYMBOLS = [
    ("peft", "EvaConfig"),
    ("peft", "LoraConfig"),
    ("peft", "LoraGAConfig"),
    ("peft", "PeftModel"),
    ("peft", "PeftType"),
    ("peft", "get_peft_model"),
    ("peft.mapping", "PEFT_TYPE_TO_CONFIG_MAPPING"),
    ("peft.tuners.lora", "LoraLayer"),
    ("peft.tuners.lora", "LoraModel"),
    ("peft.tuners.lora.layer", "ParamWrapper"),
    ("peft.tuners.tuners_utils", "BaseTunerLayer"),
    ("peft.utils", "AuxiliaryTrainingWrapper"),
    ("peft.utils", "register_peft_method"),
    ("peft.utils.integrations", "dequantize_module_weight"),
    ("peft.utils.other", "get_pattern_key"),
    ("peft.utils.transformers_weight_conversion", "convert_peft_config_for_transformers"),
]
HOOKS = {
    "inject_adapter": "self model adapter_name autocast_adapter_dtype low_cpu_mem_usage state_dict",
    "_cast_adapter_dtype": "self adapter_name autocast_adapter_dtype",
    "_create_and_replace": (
        "self lora_config adapter_name target target_name parent current_key parameter_name"
    ),
    "_get_adapter_state_dict": "model config adapter_name state_dict unwanted_adapter_names",
    "_remap_adapter_state_dict_for_load": "model config adapter_name state_dict",
    "_remove_adapter_name_from_key": "key adapter_name",
    "set_adapter": "self adapter_name inference_mode",
    "delete_adapter": "self adapter_name",
    "unload": "self",
}
LAYER_ATTRIBUTES = [
    "_active_adapter",
    "_all_available_adapter_names",
    "_disable_adapters",
    "lora_A",
    "lora_B",
    "merged",
    "merged_adapters",
    "r",
    "scaling",
    "get_base_layer",
]


@pytest.mark.parametrize(("module", "name"), SYMBOLS)
def test_symbol_exists(module, name):
    assert hasattr(importlib.import_module(module), name), f"{module}.{name}"


@pytest.mark.parametrize("name", HOOKS)
def test_hook_is_there_with_its_arguments(name):
    signature = inspect.signature(getattr(LoraModel, name))
    got = [p for p, kind in signature.parameters.items() if kind.kind is not kind.VAR_KEYWORD]
    assert got == HOOKS[name].split(), name


@pytest.mark.parametrize("name", LAYER_ATTRIBUTES)
def test_lora_layer_has_the_attribute(name):
    layer = Linear(torch.nn.Linear(3, 2), "default", peft.LoraConfig(r=1), r=1, lora_alpha=1)
    assert isinstance(layer, LoraLayer)
    assert isinstance(layer, BaseTunerLayer)
    assert hasattr(layer, name), name


@pytest.mark.parametrize(
    "name", ["_active_adapter", "_disable_adapters", "_get_available_adapters"]
)
def test_auxiliary_wrapper_has_the_attribute(name):
    wrapper = peft.utils.ModulesToSaveWrapper(torch.nn.Linear(3, 2), "default")
    assert isinstance(wrapper, peft.utils.AuxiliaryTrainingWrapper)
    assert hasattr(wrapper, name), name


def test_loading_builds_its_keys_with_the_hook_that_saving_uses():
    source = inspect.getsource(BaseTuner._remap_adapter_state_dict_for_load)
    assert "cls._remove_adapter_name_from_key" in source


def test_patterns_are_matched_as_write_patterns_assumes():
    matches = peft.utils.other.get_pattern_key
    assert matches([r"^a\.b"], "a.b") == r"^a\.b"
    assert matches([r"^a\.b"], "x.a.b") == "x.a.b", "an anchored name matches that layer only"
    assert matches(["first", "a.b"], "a.b") == "a.b"
    assert matches([r"^a\.b", "b"], "a.b") == r"^a\.b", "the first match wins"
