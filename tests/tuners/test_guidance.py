"""Which learning rate to begin with."""

import copy
import dataclasses
import json
import math
import statistics

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_gradinit import (
    EvaConfig,
    InitReport,
    LearningRate,
    LoraOneConfig,
    OLoRAConfig,
    PiSSAConfig,
    SVFitConfig,
    init_report,
    initialize,
    pairs,
    suggest_learning_rate,
)
from peft_gradinit.errors import ConfigError, NotInitializedError
from peft_gradinit.linalg import rate_of_start
from peft_gradinit.linalg.rates import SHARE_OF_LARGEST
from peft_gradinit.optim import OPTIMIZERS, LoraMuon
from tests.helpers import adapted, lora_ga, pico_gpt2, pico_llama, quiet, token_batches
from tests.moe.models import qwen3_moe

COMMON = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "o_proj"]}
PLAIN = 1 / (4 * math.sqrt(48 * 8))  # width 48, alpha 8
"""What plain LoRA is told on these layers."""


def with_config(kind, **options):
    calibration = (
        {} if kind in (LoraConfig, SVFitConfig) else {"calibration": quiet(token_batches())}
    )
    return get_peft_model(pico_llama(), kind(**COMMON, **calibration, **options))


@pytest.mark.parametrize("kind", [LoraConfig, LoraOneConfig])
def test_starts_that_are_no_longer_than_plain_loras_get_its_rate(kind):
    rate = suggest_learning_rate(with_config(kind))
    assert rate.suggested == pytest.approx(PLAIN, rel=1e-3)
    assert (rate.low, rate.high) == pytest.approx((PLAIN / 2, PLAIN * 2), rel=1e-3)


def test_orthonormal_rows_get_a_rate_that_is_lower_by_their_length_squared():
    rate = suggest_learning_rate(with_config(EvaConfig, rho=1.0)).suggested
    assert rate == pytest.approx(PLAIN / 3, rel=1e-3)


def test_lora_ga_gets_a_lower_rate_the_longer_it_starts():
    rates = [
        suggest_learning_rate(adapted(pico_llama(), lora_ga(**COMMON, **options))).suggested
        for options in ({"stable_gamma": 4}, {"stable_gamma": 16}, {"scale": "lora"})
    ]
    assert rates[0] == pytest.approx(rates[1] / 4, rel=1e-5)
    assert rates[1] < rates[2]
    # its B of length 0.1 adds 3 % to the square of the move of plain LoRA's start
    assert rates[2] == pytest.approx(PLAIN / (1 + 3 * 0.1**2), rel=1e-3)


@pytest.mark.parametrize(("init", "own"), [("pissa", PiSSAConfig), ("olora", OLoRAConfig)])
def test_a_start_of_peft_gets_the_rate_of_its_lengths(init, own):
    """The same factors as ours of that name, so the same rate."""
    of_peft = with_config(LoraConfig, init_lora_weights=init)
    ours = get_peft_model(pico_llama(), own(**COMMON))
    lengths = [next(iter(pairs(model))).A.norm().item() for model in (of_peft, ours)]
    assert lengths[0] == pytest.approx(lengths[1], rel=1e-4)
    rates = [suggest_learning_rate(model).suggested for model in (of_peft, ours)]
    assert rates[0] == pytest.approx(rates[1], rel=1e-3)


def largest_singular_values(model, layer):
    weights = [p for n, p in model.named_parameters() if n.endswith(f"{layer}.base_layer.weight")]
    return [torch.linalg.matrix_norm(w.float(), 2).item() for w in weights]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_svfit_gets_a_share_of_the_largest_singular_value(dtype, tmp_path):
    config = SVFitConfig(r=4, target_modules=["v_proj"], save_format="compact")
    base = pico_llama().to(dtype)
    peft_model = get_peft_model(copy.deepcopy(base), config)
    rate = suggest_learning_rate(peft_model).suggested
    found = largest_singular_values(peft_model, "v_proj")
    assert rate == pytest.approx(SHARE_OF_LARGEST * statistics.median(found), rel=1e-2)
    peft_model.add_adapter("other", dataclasses.replace(config))
    peft_model.set_adapter("other")
    peft_model.delete_adapter("default")
    assert suggest_learning_rate(peft_model, "other").suggested == rate
    peft_model.save_pretrained(str(tmp_path))
    again = PeftModel.from_pretrained(base, str(tmp_path / "other"))
    assert suggest_learning_rate(again).suggested == pytest.approx(rate)


def test_the_report_says_it_and_keeps_it():
    peft_model = adapted(pico_gpt2())
    report = peft_model.base_model.init_report["default"]
    rate = suggest_learning_rate(peft_model)
    assert report.learning_rate == rate
    assert f"learning rate to begin with {rate}" in report.summary()
    assert str(rate) == f"{rate[0]:.1e} ({rate[0] / 2:.1e} to {2 * rate[0]:.1e})"
    again = InitReport.from_dict(json.loads(json.dumps(report.to_dict())))
    assert again.learning_rate == rate


def test_reports_of_before_have_none():
    values = adapted(pico_llama()).base_model.init_report["default"].to_dict()
    for line in values["modules"]:
        del line["learning_rate"]
    report = InitReport.from_dict(values)
    assert report.learning_rate is None
    assert "learning rate" not in report.summary()


def test_names_choose_the_adapter():
    model = with_config(LoraConfig)
    model.add_adapter("wide", LoraConfig(**{**COMMON, "lora_alpha": 32}))
    assert suggest_learning_rate(model, "wide").suggested == pytest.approx(PLAIN / 2)


def test_experts_count_by_their_own_rank():
    model = qwen3_moe()
    model.set_experts_implementation("eager")
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"]
    )
    want = 1 / (4 * math.sqrt(model.config.hidden_size * 8))
    assert suggest_learning_rate(get_peft_model(model, config)).suggested == pytest.approx(want)


def test_a_model_without_the_adapter_is_an_error():
    with pytest.raises(ConfigError, match="adapter named 'other'"):
        suggest_learning_rate(with_config(LoraConfig), "other")


def test_nothing_of_the_model_changes():
    model = with_config(LoraConfig)
    before = {n: p.clone() for n, p in model.named_parameters()}
    suggest_learning_rate(model)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_layers_of_high_rank_count_more():
    layers = [(1e-2, 1), (1e-3, 8), (1e-2, 2), (None, 100)]
    assert LearningRate.of_layers(layers) == (1e-3, 5e-4, 2e-3)
    assert LearningRate.of_layers([(None, 4), (1e-3, 0)]) is None


def test_a_deferred_adapter_has_no_rate_yet():
    """Plain LoRA's would be several times too high for the start that it will get."""
    model = get_peft_model(pico_llama(), lora_ga(calibration="deferred"))
    for name in ("adamw", "lora_pro"):
        with pytest.raises(NotInitializedError, match="its rate depends on the start that it gets"):
            suggest_learning_rate(model, optimizer=name)
    assert suggest_learning_rate(model, optimizer="lora_muon").suggested == 0.03
    report = initialize(model, quiet(token_batches()))
    assert suggest_learning_rate(model) == report.learning_rate


@pytest.mark.parametrize("make", [lora_ga, lambda: LoraConfig(**COMMON)], ids=["lora_ga", "lora"])
def test_every_optimiser_of_pairs_has_a_rate(make):
    model = adapted(pico_llama(), make())
    of_adamw = suggest_learning_rate(model)
    assert suggest_learning_rate(model, optimizer="adamw") == of_adamw
    assert suggest_learning_rate(model, optimizer="lora_muon").suggested == 0.03
    for kind in set(OPTIMIZERS) - {LoraMuon}:
        rate = suggest_learning_rate(model, optimizer=kind.name)
        ratios = [ours / of for ours, of in zip(rate, of_adamw, strict=True)]
        assert ratios == pytest.approx([ratios[0]] * 3)
        assert 0.1 < ratios[0] < 1


@pytest.mark.parametrize("name", ["lora_muon", "lora_one"])
def test_an_optimiser_of_pairs_has_no_rate_without_pairs(name):
    for model in (pico_llama(), get_peft_model(pico_llama(), SVFitConfig(r=4))):
        with pytest.raises(ConfigError, match=f"nothing that {name} could train"):
            suggest_learning_rate(model, optimizer=name)


def test_an_optimiser_without_a_rule_is_named():
    with pytest.raises(ConfigError, match=r"no rule is known for the rate of 'sgd', only for"):
        suggest_learning_rate(adapted(pico_llama(), lora_ga()), optimizer="sgd")


@pytest.mark.parametrize("stable_gamma", [1, 0.1])
@pytest.mark.filterwarnings("ignore:the step that LoRA-One starts with")
def test_a_start_whose_step_was_shortened_gets_the_rate_of_what_it_is(stable_gamma):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 4)
    )
    x, y = torch.randn(512, 64), torch.randint(0, 4, (512,))
    data = quiet([(x, y)], loss_fn=lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1]))
    config = LoraOneConfig(
        r=4, lora_alpha=8, stable_gamma=stable_gamma, target_modules="all-linear", calibration=data
    )
    model = get_peft_model(net, config)
    report = init_report(model)
    assert report.step.scale < 1
    live = {
        pair.name: rate_of_start(pair.A.detach(), pair.B.detach(), pair.scaling)
        for pair in pairs(model)
    }
    assert {m.name: pytest.approx(m.learning_rate) for m in report.modules} == live
