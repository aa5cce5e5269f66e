"""What a calibration will cost, against what it did cost."""

import pytest
import torch

from peft_gradinit import EvaConfig, LoraGAConfig, calibrate
from peft_gradinit.recipes import CalibrationSection
from peft_gradinit.recipes.estimate import estimate
from peft_gradinit.tuners import planned_targets
from tests.helpers import pico_gpt2, pico_llama, quiet, token_batches

WIDE = {"hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 1}


def of(model, config, **options):
    targets = planned_targets(model, config)
    section = CalibrationSection(**options)
    return estimate(model, targets, config.statistic, [20] * 12, section)


@pytest.mark.parametrize("estimator", ["sketch", "dense"])
@pytest.mark.parametrize("method", [LoraGAConfig, EvaConfig])
def test_statistics_hold_what_was_said(method, estimator):
    model = pico_llama(**WIDE)
    config = method(r=2, target_modules="all-linear", calibration="deferred", rho=1)
    costs = of(model, config, estimator=estimator)
    facts = calibrate(model, config, quiet(token_batches(), estimator=estimator)).facts
    # The estimate adds the random test matrices, and knows nothing of inputs that layers share.
    assert facts.state_bytes <= costs.statistic_bytes < 6 * facts.state_bytes
    if method is LoraGAConfig and estimator == "dense":
        assert facts.state_bytes == costs.statistic_bytes


def test_weights_and_arithmetic_on_the_meta_device():
    model = pico_llama()
    with torch.device("meta"):
        empty = type(model)(model.config)
    config = LoraGAConfig(r=2, target_modules="all-linear", calibration="deferred")
    here, there = (of(m, config, estimator="dense") for m in (model, empty))
    for name in ("weight_bytes", "statistic_bytes", "activation_bytes", "flops", "n_targets"):
        assert getattr(here, name) == getattr(there, name)
    n_layers = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    linear -= model.lm_head.weight.numel()
    assert here.flops == 240 * (4 * n_layers + 2 * linear)
    assert here.n_tokens == 240
    assert here.seconds > 0


def test_a_tied_head_is_computed_with():
    config = LoraGAConfig(
        r=2, target_modules=["c_attn"], fan_in_fan_out=True, calibration="deferred"
    )
    model = pico_gpt2()
    of_head = 4 * 240 * model.lm_head.weight.numel()
    blocks = sum(p.numel() for p in model.transformer.h.parameters())
    assert of(model, config, estimator="dense").flops > 4 * 240 * blocks + of_head
