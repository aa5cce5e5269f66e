"""After a failure the model is as it was; targets without a gradient are named."""

import dataclasses

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import nn

from peft_gradinit import (
    EvaConfig,
    LoraGAConfig,
    LoraOneConfig,
    PiSSAConfig,
    SVFitConfig,
    calibrate,
    init_report,
    initialize,
    load_for_training,
)
from peft_gradinit.errors import (
    CalibrationError,
    ConfigError,
    DataError,
    FingerprintError,
    GradInitError,
    NotInitializedError,
)
from peft_gradinit.tuners import GradInitModel
from peft_gradinit.tuners.lora import model as model_module
from tests.failures import assert_as_before, failing_calibration, snapshot
from tests.helpers import (
    adapted,
    anchors,
    logits,
    lora_ga,
    pico_llama,
    quiet,
    same_factors,
    token_batches,
    train_steps,
)


@pytest.mark.parametrize(
    ("error", "call"),
    [(RuntimeError("mine"), 2), (KeyboardInterrupt("mine"), 2), (KeyboardInterrupt("mine"), 5)],
    ids=["error", "interrupt", "interrupt-after-injection"],
)
def test_failure_in_get_peft_model_leaves_the_model_as_it_was(error, call):
    model = pico_llama()
    model.model.norm.weight.requires_grad_(False)
    before = snapshot(model)
    with pytest.raises(type(error), match="mine"):
        adapted(model, lora_ga(calibration=failing_calibration(error, call)))
    assert_as_before(model, before)
    assert not hasattr(model, "peft_config")
    assert same_factors(anchors(adapted(model)), anchors(adapted(pico_llama())))


@pytest.mark.parametrize("call", [2, 5], ids=["in-the-pass", "after-injection"])
def test_interrupt_in_add_adapter_leaves_the_model_as_it_was(call):
    peft_model = adapted(pico_llama())
    train_steps(peft_model)
    output, before = logits(peft_model), snapshot(peft_model)
    with pytest.raises(KeyboardInterrupt):
        peft_model.add_adapter(
            "second", lora_ga(calibration=failing_calibration(KeyboardInterrupt(), call))
        )
    assert list(peft_model.peft_config) == ["default"]
    assert_as_before(peft_model, before)
    peft_model.add_adapter("second", lora_ga())
    assert torch.equal(logits(peft_model), output)
    assert anchors(peft_model, "second")


def test_loss_that_cannot_do_one_sequence_costs_the_drift_only():
    config = lora_ga(calibration=failing_calibration(RuntimeError("needs pairs"), call=4))
    assert adapted(pico_llama(), config).base_model.init_report["default"].drift is None


def test_same_config_object_calibrates_again_unless_its_generator_is_consumed():
    config = lora_ga()
    peft_model = adapted(pico_llama(), config)
    peft_model.add_adapter("second", config)
    assert same_factors(anchors(peft_model), anchors(peft_model, "second"))

    config = lora_ga(calibration=quiet(b for b in token_batches()))
    peft_model = adapted(pico_llama(), config)
    before = logits(peft_model)
    with pytest.raises(GradInitError, match="a generator can be read only once"):
        peft_model.add_adapter("second", config)
    assert list(peft_model.peft_config) == ["default"]
    assert torch.equal(logits(peft_model), before)


def never_runs(model):
    model.model.layers[1].spare = torch.nn.Linear(48, 48)
    return model


def test_target_that_never_runs_is_an_error_or_a_named_plain_start(tmp_path):
    with pytest.raises(CalibrationError, match=r"layers\.1\.spare: it never ran"):
        adapted(never_runs(pico_llama()))
    with pytest.warns(UserWarning, match=r"1 targets a plain LoRA start .*layers\.1\.spare"):
        peft_model = adapted(never_runs(pico_llama()), lora_ga(uncalibrated="lora"))
    report = peft_model.base_model.init_report["default"]
    (line,) = [m for m in report.modules if m.name.endswith("spare")]
    assert (line.method, line.captured_energy, line.start_norm) == ("lora", None, 0.0)
    assert "never ran" in line.fallback
    peft_model.train()
    train_steps(peft_model)
    peft_model.save_pretrained(tmp_path)
    torch.manual_seed(0)
    loaded = PeftModel.from_pretrained(never_runs(pico_llama()), tmp_path)
    spare = loaded.base_model.model.model.layers[1].spare
    assert not spare.get_delta_weight("default").any()


def test_adapter_made_in_inference_mode_is_trainable():
    model = pico_llama()
    with torch.inference_mode():
        peft_model = adapted(model)
    losses = train_steps(peft_model, n=6)
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("config_class", [LoraGAConfig, LoraOneConfig, EvaConfig, PiSSAConfig])
def test_an_adapter_for_inference_is_started_and_frozen_not_plain_lora(config_class):
    options = {"r": 4, "target_modules": ["q_proj"], "inference_mode": True}
    if config_class is not PiSSAConfig:
        with pytest.raises(ConfigError, match="has no calibration"):
            get_peft_model(pico_llama(), config_class(**options))
        options["calibration"] = quiet(token_batches())
    peft_model = get_peft_model(pico_llama(), config_class(**options))
    assert isinstance(peft_model.peft_config["default"], config_class)
    assert init_report(peft_model).method == config_class.method
    assert not any(p.requires_grad for n, p in peft_model.named_parameters() if "lora_" in n)


class WithOut(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.out = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x):
        return self.out(self.inner(x))


@pytest.mark.parametrize("config_class", [LoraGAConfig, SVFitConfig])
def test_a_name_that_ends_a_part_of_pefts_layers_is_refused_before_data_are_read(config_class):
    config = config_class(target_modules=["inner"], modules_to_save=["out"])
    if config_class is LoraGAConfig:
        config.calibration = failing_calibration(AssertionError("was read"), 1)
    with pytest.raises(ConfigError, match="'out', which also ends 'lora_dropout'"):
        get_peft_model(WithOut(), config)


def test_an_error_of_peft_names_no_class_of_ours():
    peft_model = adapted(pico_llama(), lora_ga(bias="all"))
    with pytest.raises(ValueError, match=r"^LoraModel supports only 1 adapter with bias"):
        peft_model.add_adapter("second", lora_ga(bias="all"))
    assert list(peft_model.peft_config) == ["default"]


def test_low_cpu_mem_usage_is_refused_since_a_start_needs_memory():
    model = pico_llama()
    with pytest.raises(ConfigError, match="low_cpu_mem_usage=True puts the adapter on the meta"):
        get_peft_model(model, lora_ga(), low_cpu_mem_usage=True)
    peft_model = adapted(model)
    with pytest.raises(ConfigError, match="low_cpu_mem_usage=True puts the adapter on the meta"):
        peft_model.add_adapter("second", lora_ga(), low_cpu_mem_usage=True)
    assert list(peft_model.peft_config) == ["default"]


@pytest.mark.parametrize("damage", ["missing", "nan", "short"])
def test_damaged_result_is_refused_and_never_plain_lora(damage):
    result = calibrate(pico_llama(), lora_ga(), quiet(token_batches()))
    name = "model.layers.0.self_attn.q_proj"
    readouts = dict(result.readouts)
    if damage == "missing":
        del readouts[name]
    elif damage == "nan":
        readouts[name] = {**readouts[name], "S": readouts[name]["S"] * float("nan")}
    else:
        readouts[name] = result.triplets[name].truncate(3)._asdict()
    broken = dataclasses.replace(result, readouts=readouts)
    with pytest.raises(FingerprintError, match=f"damaged: {name}"):
        adapted(pico_llama(), lora_ga(calibration=broken))


def test_weighted_sum_of_live_anchored_adapters_is_refused_not_empty():
    peft_model = adapted(pico_llama())
    with pytest.raises(ConfigError, match=r"cannot combine the live adapters \['default'\]"):
        peft_model.add_weighted_adapter(["default"], [1.0], "sum")


def test_deferred_adapter_refuses_a_backward_in_eval_mode_too():
    peft_model = adapted(pico_llama(), lora_ga(calibration="deferred")).eval()
    loss = peft_model(**token_batches()[0]).loss
    with pytest.raises(NotInitializedError, match="has no start yet"):
        loss.backward()


def test_interrupted_initialize_can_be_repeated(monkeypatch):
    peft_model = adapted(pico_llama(), lora_ga(calibration="deferred"))

    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(model_module, "drift", interrupt)
        with pytest.raises(KeyboardInterrupt):
            initialize(peft_model, quiet(token_batches()))
    assert initialize(peft_model, quiet(token_batches())).drift <= 1e-5


def test_interrupt_after_the_cast_of_a_bfloat16_base_leaves_it_bare(monkeypatch):
    model = pico_llama().to(torch.bfloat16)
    write, calls = GradInitModel._write, []

    def second_raises(self, *args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(self, *args)

    monkeypatch.setattr(GradInitModel, "_write", second_raises)
    with pytest.raises(KeyboardInterrupt):
        adapted(model)
    assert not any("lora" in name for name, _ in model.named_modules())


def test_loading_without_weights_leaves_the_base_bare(tmp_path):
    adapted(pico_llama()).save_pretrained(tmp_path)
    (tmp_path / "adapter_model.safetensors").unlink()
    model = pico_llama()
    with pytest.raises(DataError, match="there is no adapter to load"):
        load_for_training(model, tmp_path)
    assert not any("lora" in name for name, _ in model.named_modules())
