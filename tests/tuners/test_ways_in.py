"""Three ways in, one result; a deferred adapter waits for its start."""

import pytest
import torch
from peft import LoraConfig, get_peft_model

from peft_gradinit import LoraGAConfig, calibrate, initialize
from peft_gradinit.errors import ConfigError, FingerprintError, NotInitializedError
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


@pytest.mark.filterwarnings("ignore:LoRA-GA needs")
@pytest.mark.parametrize("way", ["result", "file", "folder", "deferred", "deferred-result"])
@pytest.mark.parametrize("r", [4, 20], ids=["r4", "lowered-ranks"])
def test_every_way_in_gives_bitwise_the_same_start(way, r, tmp_path):
    want = adapted(pico_llama(), lora_ga(r=r))
    result = calibrate(pico_llama(), lora_ga(r=r), quiet(token_batches()))
    if way.startswith("deferred"):
        got = adapted(pico_llama(), lora_ga(r=r, calibration="deferred"))
        initialize(got, result if way == "deferred-result" else quiet(token_batches()))
    else:
        file = result.save(tmp_path / "saved")
        data = {"result": result, "file": file, "folder": str(tmp_path / "saved")}[way]
        got = adapted(pico_llama(), lora_ga(r=r, calibration=data))
    assert same_factors(anchors(got), anchors(want))
    assert torch.equal(logits(got), logits(want))
    lines = [m.base_model.init_report["default"].modules for m in (got, want)]
    assert lines[0] == lines[1]


def test_one_result_serves_other_options_of_the_method():
    result = calibrate(pico_llama(), lora_ga(), quiet(token_batches()))
    options = {"direction": "A2rBr", "scale": "unit", "lora_alpha": 3, "use_rslora": True}
    want = adapted(pico_llama(), lora_ga(**options))
    got = adapted(pico_llama(), lora_ga(calibration=result, **options))
    assert same_factors(anchors(got), anchors(want))


def test_calibrate_leaves_the_model_alone_and_works_on_a_peft_model():
    peft_model = adapted(pico_llama())
    train_steps(peft_model)
    before = logits(peft_model)
    result = calibrate(peft_model, lora_ga(), quiet(token_batches()))
    assert torch.equal(logits(peft_model), before)
    plain = calibrate(pico_llama(), lora_ga(), quiet(token_batches()))
    for name, svd in result.triplets.items():
        assert all(torch.equal(a, b) for a, b in zip(svd, plain.triplets[name], strict=True))


@pytest.mark.parametrize(
    ("model_options", "config_options", "calibration_options", "message"),
    [
        ({"seed": 7}, {}, {}, "model weight"),
        ({}, {"target_modules": ["q_proj"]}, {}, "target"),
        ({}, {"r": 5}, {}, r"target: .*\[48, 112, 8\].*\[48, 112, 10\]"),
        ({}, {}, {"estimator": "dense"}, "estimator='sketch' but estimator='dense'"),
        ({}, {}, {"seed": 3}, "seed=0 but seed=3"),
    ],
    ids=["model", "targets", "rank", "estimator", "seed"],
)
def test_saved_result_of_something_else_is_refused(
    model_options, config_options, calibration_options, message
):
    result = calibrate(pico_llama(), lora_ga(), quiet(token_batches()))
    config = lora_ga(calibration=quiet(result, **calibration_options), **config_options)
    model = pico_llama(**model_options)
    with pytest.raises(FingerprintError, match=message):
        adapted(model, config)
    assert not any("lora" in name for name, _ in model.named_modules())


@pytest.mark.parametrize("value", [None, ...], ids=["none", "left-out"])
def test_config_without_calibration_says_what_to_pass(value):
    options = {} if value is ... else {"calibration": value}
    config = LoraGAConfig(target_modules="all-linear", **options)
    with pytest.raises(ConfigError, match=r"has no calibration.*pass calibration=<DataLoader"):
        get_peft_model(pico_llama(), config)


def test_deferred_adapter_evaluates_as_the_base_but_refuses_to_train_and_save(tmp_path):
    peft_model = adapted(pico_llama(), lora_ga(calibration="deferred"))
    assert torch.equal(logits(peft_model), logits(pico_llama()))
    assert peft_model.base_model.init_report == {}
    peft_model.train()
    with pytest.raises(NotInitializedError, match=r"call .*initialize\(model, data\)"):
        peft_model(**token_batches()[0])
    with pytest.raises(NotInitializedError, match="'default' is deferred and 14 layers"):
        peft_model.save_pretrained(tmp_path)
    with torch.no_grad():
        peft_model(**token_batches()[0])  # evaluation in train mode is allowed


def test_initialize_keeps_the_parameters_so_that_an_earlier_optimizer_trains_them():
    peft_model = adapted(pico_llama(), lora_ga(calibration="deferred"))
    parameters = {n: p for n, p in peft_model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-2)
    report = initialize(peft_model, quiet(token_batches()))
    assert peft_model.base_model.init_report == {"default": report}
    assert all(p is parameters[n] for n, p in peft_model.named_parameters() if n in parameters)
    before = logits(peft_model)
    peft_model(**token_batches()[0]).loss.backward()
    optimizer.step()
    assert not torch.equal(logits(peft_model), before)


def test_initialize_twice_or_on_the_wrong_thing_is_refused():
    peft_model = adapted(pico_llama(), lora_ga(calibration="deferred"))
    with pytest.raises(ConfigError, match=r"no adapter 'other'; the model has \['default'\]"):
        initialize(peft_model, quiet(token_batches()), "other")
    with pytest.raises(ConfigError, match="has no calibration"):
        initialize(peft_model, None)
    initialize(peft_model, quiet(token_batches()))
    with pytest.raises(ConfigError, match="has its start already"):
        initialize(peft_model, quiet(token_batches()))
    plain = get_peft_model(pico_llama(), LoraConfig(target_modules=["q_proj"]))
    with pytest.raises(ConfigError, match=r"starts adapters .*got PeftModel .*\['LoraConfig'\]"):
        initialize(plain, quiet(token_batches()))
    with pytest.raises(ConfigError, match=r"peft_gradinit\.LoraGAConfig, not peft\.LoraGAConfig"):
        calibrate(pico_llama(), LoraConfig(), quiet(token_batches()))


def test_loading_after_initialize_is_not_overwritten_by_the_start(tmp_path):
    trained = adapted(pico_llama())
    train_steps(trained)
    trained.save_pretrained(tmp_path)
    peft_model = adapted(pico_llama().to(torch.bfloat16), lora_ga(calibration="deferred"))
    initialize(peft_model, quiet(token_batches()))
    peft_model.load_adapter(tmp_path, "default", is_trainable=True)
    got = {n: p for n, p in peft_model.named_parameters() if ".lora_" in n}
    assert all(torch.equal(p, got[n]) for n, p in trained.named_parameters() if n in got)


def test_one_result_serves_a_model_that_has_other_adapters_already():
    config = lora_ga(
        target_modules=["q_proj"], trainable_token_indices=[3], modules_to_save=["lm_head"]
    )
    peft_model = adapted(pico_llama(), config)
    train_steps(peft_model)
    options = {"target_modules": ["v_proj", "down_proj"]}
    result = calibrate(pico_llama(), lora_ga(**options), quiet(token_batches()))
    peft_model.add_adapter("second", lora_ga(calibration=result, **options))
    alone = adapted(pico_llama(), lora_ga(**options))
    assert same_factors(anchors(peft_model, "second"), anchors(alone))
