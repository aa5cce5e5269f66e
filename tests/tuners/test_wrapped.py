"""Models that are wrapped, compiled or sharded when PEFT is asked for an adapter or its tensors."""

from typing import get_args

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file

from peft_gradinit import calibrate, export_adapter, pairs, with_output_layer
from peft_gradinit.errors import ConfigError
from peft_gradinit.export.adapter import ExportTarget, check_export
from peft_gradinit.records import records_of
from tests.helpers import logits, pico_llama, quiet, token_batches, train_steps
from tests.methods.rows import INFO, config_of, every_method, started


@every_method
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
@pytest.mark.parametrize("name", ["default", "second"])
def test_second_get_peft_model_is_refused_and_leaves_the_first_adapter(method, name, tmp_path):
    model = started(method)
    train_steps(model)
    want, config, record = logits(model), model.peft_config["default"], records_of(model)["default"]
    with pytest.raises(ConfigError, match=r"get_peft_model got a model that has .*add_adapter"):
        get_peft_model(model, config_of(method, r=2), name)
    with pytest.raises(ConfigError, match="already"):
        inject_adapter_in_model(config_of(method, r=2), model.get_base_model())
    assert torch.equal(logits(model), want)
    assert model.peft_config == {"default": config}
    assert model.peft_config["default"] is config
    assert records_of(model) == {"default": record}
    model.save_pretrained(tmp_path)


@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")
def test_second_get_peft_model_is_refused_beside_an_adapter_of_peft():
    model = get_peft_model(pico_llama(), LoraConfig(target_modules="all-linear"))
    with pytest.raises(ConfigError, match="it is a PeftModel"):
        get_peft_model(model, config_of("lora_ga"), "second")
    assert list(model.peft_config) == ["default"]


@every_method
@pytest.mark.filterwarnings("ignore:You are trying to modify a model with PEFT for a second time")
def test_unloading_makes_room_for_another_adapter(method):
    options = {"rho": 1} if method == "eva" else {}
    again = get_peft_model(started(method).unload(), config_of(method, r=2, **options))
    assert set(records_of(again)["default"].ranks.values()) == {2}


@every_method
@pytest.mark.parametrize("peft_model", [True, False], ids=["PeftModel", "injected"])
def test_tensors_of_a_compiled_model_are_those_of_the_model(method, peft_model):
    options = {"rho": 1} if method == "eva" else {}
    if peft_model:
        model = started(method, **options)
    else:
        model = inject_adapter_in_model(config_of(method, **options), pico_llama())
    want = get_peft_model_state_dict(model)
    got = get_peft_model_state_dict(torch.compile(model, backend="eager"))
    assert got.keys() == {f"_orig_mod.{key}" for key in want}
    assert all(torch.equal(got[f"_orig_mod.{key}"], tensor) for key, tensor in want.items())


@every_method
def test_a_compiled_base_is_refused_before_it_is_calibrated(method):
    """PEFT would write the wrapper's name into the file, which then fits no model without one."""

    def unread():
        pytest.fail("the data were read")
        yield

    base = pico_llama()
    with pytest.raises(ConfigError, match=r"torch\.compile\(get_peft_model\(model, config\)\)"):
        get_peft_model(torch.compile(base, backend="eager"), config_of(method, unread()))
    assert base.state_dict().keys() == pico_llama().state_dict().keys()
    assert not vars(base).get("peft_config")
    assert get_peft_model(base, config_of(method)).peft_config.keys() == {"default"}


def test_a_calibration_of_a_compiled_model_is_that_of_the_model():
    base = pico_llama()
    config, data = config_of("lora_ga"), quiet(token_batches())
    result = calibrate(torch.compile(base, backend="eager"), config, data)
    want = get_peft_model(pico_llama(), config_of("lora_ga"))
    got = get_peft_model(base, config_of("lora_ga", result))
    for one, other in zip(pairs(got), pairs(want), strict=True):
        assert one.name == other.name
        assert torch.allclose(one.B @ one.A, other.B @ other.A, atol=1e-6)


@pytest.mark.parametrize("method", [m for m in INFO if m != "svfit"])
@pytest.mark.parametrize("shape", [(32,), (0,)])
def test_what_is_left_of_a_factor_in_one_process_is_not_saved(method, shape, tmp_path):
    model = started(method)
    state_dict = model.state_dict()
    key = next(k for k in state_dict if ".lora_A.default" in k)
    state_dict[key] = torch.zeros(shape)
    with pytest.raises(
        ConfigError, match=r"where a matrix is expected.*accelerator\.get_state_dict"
    ):
        model.save_pretrained(tmp_path, state_dict=state_dict)


@pytest.mark.parametrize("target", get_args(ExportTarget))
def test_an_export_of_a_compiled_model_is_that_of_the_model(target, tmp_path):
    model = started("lora_one")
    train_steps(model)
    compiled = torch.compile(model, backend="eager")
    check_export(compiled, target)
    want = export_adapter(model, tmp_path / "plain", target)
    assert export_adapter(compiled, tmp_path / "compiled", target) == want
    files = {path.relative_to(tmp_path / "plain") for path in (tmp_path / "plain").rglob("*")}
    assert {
        p.relative_to(tmp_path / "compiled") for p in (tmp_path / "compiled").rglob("*")
    } == files
    (weights,) = (name for name in files if name.suffix == ".safetensors")
    one, other = (load_file(tmp_path / name / weights) for name in ("plain", "compiled"))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_the_output_layer_of_a_compiled_model_is_that_of_the_model():
    model, config = pico_llama(), LoraConfig(r=8, target_modules=["q_proj", "v_proj"])
    want = with_output_layer(model, config)
    assert with_output_layer(torch.compile(model, backend="eager"), config) == want
