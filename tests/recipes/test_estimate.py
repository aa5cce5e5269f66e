"""What a calibration will cost, against what it did cost."""

from pathlib import Path

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from peft_gradinit import EvaConfig, LoraGAConfig, calibrate
from peft_gradinit.recipes import CalibrationSection, ModelSection, empty_model
from peft_gradinit.recipes.estimate import estimate
from peft_gradinit.recipes.speed import speed_of
from peft_gradinit.starts import planned_targets
from tests.helpers import pico_gpt2, pico_llama, quiet, token_batches

WIDE = {"hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 1}


SHAPES = Path(__file__).parents[2] / "configs" / "shapes"


def of(model, config, n_processes=1, **options):
    targets = planned_targets(model, config)
    section = CalibrationSection(**options)
    return estimate(model, targets, config.needs(), [20] * 12, section, n_processes=n_processes)


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


def test_processes_send_sums_and_share_the_time():
    config = LoraGAConfig(r=2, target_modules="all-linear", calibration="deferred")
    alone, two, eight = (of(pico_llama(**WIDE), config, n_processes=n) for n in (1, 2, 8))
    assert alone.summed_bytes == alone.agreed_bytes == alone.broadcast_bytes == 0
    assert two.summed_bytes == eight.summed_bytes > 0
    assert two.broadcast_bytes == two.result_bytes == alone.result_bytes
    assert alone.flops == two.flops == eight.flops
    assert alone.dense_summed_bytes == 0
    assert two.dense_summed_bytes == two.dense_bytes > two.largest_layer_bytes


@pytest.mark.parametrize(
    ("name", "billions", "n_targets"),
    [("llama-2-7b", 6.74, 224), ("llama-3-70b", 70.55, 560), ("moe-400b", 397.2, 25_056)],
)
def test_shapes_are_those_of_their_names(name, billions, n_targets):
    model = empty_model(ModelSection(name=str(SHAPES / name)))
    assert all(p.device.type == "meta" for p in model.parameters())
    assert sum(p.numel() for p in model.parameters()) / 1e9 == pytest.approx(billions, rel=1e-3)
    config = LoraGAConfig(r=8, target_modules="all-linear", calibration="deferred")
    assert len(planned_targets(model, config)) == n_targets


def moe(**options):
    values = {
        "vocab_size": 96,
        "hidden_size": 64,
        "moe_intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "head_dim": 16,
    }
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**values, **options})).eval()


def test_experts_compute_on_the_tokens_that_they_are_given():
    config = LoraGAConfig(
        r=2, target_modules=[], target_parameters=["experts.down_proj"], calibration="deferred"
    )
    model = moe()
    costs = of(model, config, estimator="dense")
    assert costs.n_targets == 8
    experts = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n)
    others = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n) - experts
    of_targets = 2 * model.model.layers[0].mlp.experts.down_proj.numel()
    assert costs.flops == 240 * (4 * (others + experts / 4) + of_targets / 4)


def test_experts_hold_what_was_said():
    model = moe()
    config = LoraGAConfig(r=2, target_modules="all-linear", calibration="deferred")
    costs = of(model, config, estimator="dense")
    result = calibrate(model, config, quiet(token_batches(), estimator="dense"))
    assert costs.n_targets == len(result.fingerprint.targets) == 4 + 1 + 2 * 8
    assert not result.failures
    assert costs.statistic_bytes == result.facts.state_bytes


def simulated(flops, launch=8e-6, wait=40e-6):
    """A device that is asked for products, computes them one after the other, and is waited for."""

    def run(size, n):
        asked = computed = 0.0
        for _ in range(n):
            asked += launch
            computed = max(computed, asked) + 2 * size**3 / flops
        return max(asked, computed) + wait

    return run


@pytest.mark.parametrize("teraflops", [0.02, 0.5, 10, 60, 600, 2500])
def test_the_speed_is_that_of_the_products_not_of_asking_for_them(teraflops):
    assert speed_of(simulated(teraflops * 1e12)) == pytest.approx(teraflops * 1e12, rel=0.03)
