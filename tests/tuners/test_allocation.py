"""Ranks shared by a budget: kept exactly, written as anchored names, alive everywhere."""

import dataclasses
import json
import math

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from peft_gradinit import (
    CalibrationResult,
    EvaConfig,
    LoraGAConfig,
    LoraOneConfig,
    PiSSAConfig,
    calibrate,
    load_for_training,
    pairs,
)
from peft_gradinit.errors import ConfigError, FingerprintError, ShapeError
from peft_gradinit.records import records_of
from peft_gradinit.starts.allocation import offered_rank
from peft_gradinit.starts.target import Target
from tests.helpers import logits, pico_gpt2, pico_llama, quiet, relative_error, token_batches
from tests.helpers import train_steps as steps

GRADIENT_METHODS = [LoraGAConfig, LoraOneConfig]
METHODS = [*GRADIENT_METHODS, EvaConfig]
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method)
ALLOCATIONS = [
    *[pytest.param(m, "explained_variance", id=f"{m.method}-explained") for m in METHODS],
    *[pytest.param(m, "gradient_energy", id=f"{m.method}-energy") for m in GRADIENT_METHODS],
]
every_allocation = pytest.mark.parametrize(("method", "allocation"), ALLOCATIONS)


def config_of(method, allocation="explained_variance", **options):
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    values |= {"rank_allocation": allocation, "calibration": quiet(token_batches())}
    return method(**{**values, **options})


def allocated(method, allocation="explained_variance", model=None, **options):
    return get_peft_model(model or pico_llama(), config_of(method, allocation, **options))


def ranks_of(peft_model):
    return peft_model.base_model.init_report["default"].ranks()


def live_ranks(peft_model, name="default"):
    modules = peft_model.get_base_model().named_modules()
    return {n: m.r[name] for n, m in modules if name in getattr(m, "lora_A", {})}


def without_zeros(ranks):
    return {n: r for n, r in ranks.items() if r}


# The budget --------------------------------------------------------------------------------------


@every_allocation
@pytest.mark.parametrize("make", [pico_llama, pico_gpt2], ids=["llama", "gpt2-conv1d"])
def test_the_sum_of_ranks_stays_and_every_layer_within_its_limits(method, allocation, make):
    peft_model = allocated(method, allocation, make())
    ranks = ranks_of(peft_model)
    assert sum(ranks.values()) == 4 * len(ranks)
    assert len(set(ranks.values())) > 1
    least = 0 if method is EvaConfig else 1
    assert min(ranks.values()) >= least
    assert max(ranks.values()) <= 8  # rho 2
    assert live_ranks(peft_model) == without_zeros(ranks)


def n_trained(peft_model):
    return sum(p.numel() for p in peft_model.parameters() if p.requires_grad)


@every_allocation
@pytest.mark.parametrize("make", [pico_llama, pico_gpt2], ids=["llama", "gpt2-conv1d"])
def test_a_budget_of_parameters_is_what_uniform_ranks_train(method, allocation, make):
    uniform = n_trained(allocated(method, "uniform", make()))
    peft_model = allocated(method, allocation, make(), budget="parameters")
    by_layer = {p.name: sum(p.A.shape[1:]) + p.B.shape[0] for p in pairs(peft_model)}
    assert uniform - max(by_layer.values()) < n_trained(peft_model) <= uniform
    assert len(set(ranks_of(peft_model).values())) > 1
    half = allocated(method, allocation, make(), budget=uniform // 2)
    assert uniform // 2 - max(by_layer.values()) < n_trained(half) <= uniform // 2


@pytest.mark.parametrize("options", [{"use_dora": True}, {"lora_bias": True}], ids=str)
@pytest.mark.parametrize("min_rank", [0, 1])
def test_magnitudes_and_biases_are_trained_numbers(options, min_rank):
    options = {**options, "min_rank": min_rank}
    base = {"model": pico_llama(attention_bias=True, mlp_bias=True)}
    whole = allocated(LoraOneConfig, "gradient_energy", **base, budget=3000, **options)
    assert 3000 - 300 < n_trained(whole) <= 3000
    base = {"model": pico_llama(attention_bias=True, mlp_bias=True)}
    uniform = n_trained(allocated(LoraOneConfig, "uniform", **base, **options))
    base = {"model": pico_llama(attention_bias=True, mlp_bias=True)}
    equal = allocated(LoraOneConfig, "gradient_energy", **base, budget="parameters", **options)
    assert uniform - 300 < n_trained(equal) <= uniform


def test_the_rank_that_gains_most_for_its_numbers_comes_first():
    """Whatever else, no layer could give a rank to another and gain."""
    peft_model = allocated(LoraOneConfig, "gradient_energy", budget="parameters", rho=4)
    ranks = ranks_of(peft_model)
    result = calibrate(pico_llama(), config_of(LoraOneConfig, r=16), quiet(token_batches()))
    costs = {p.name: p.A.shape[1] + p.B.shape[0] for p in pairs(peft_model)}
    gains = {n: (result.triplets[n].S ** 2 / costs[n]).tolist() for n in ranks}
    last = {n: gains[n][r - 1] for n, r in ranks.items() if r > 1}
    following = {n: gains[n][r] for n, r in ranks.items() if r < 16}
    cheapest = min(costs.values())
    left = 4 * sum(costs.values()) - sum(costs[n] * r for n, r in ranks.items())
    assert left < cheapest
    wanting = {n: gain for n, gain in following.items() if costs[n] == cheapest}
    assert max(wanting.values()) <= min(last.values()) * 1.01


@pytest.mark.parametrize("budget", ["numbers", 0, -3, 1.5, True, 0.0, float("nan")])
def test_a_budget_that_is_none_is_refused(budget):
    with pytest.raises(ConfigError, match="budget must be 'ranks', 'parameters', a whole number"):
        config_of(LoraOneConfig, budget=budget)


@pytest.mark.parametrize("budget", ["parameters", 1000])
def test_a_budget_without_an_allocation_is_refused(budget):
    with pytest.raises(ConfigError, match=r"rank_allocation to one of .*gradient_energy"):
        config_of(LoraOneConfig, "uniform", budget=budget)
    with pytest.raises(ConfigError, match="keeps the ranks; leave budget out"):
        PiSSAConfig(r=4, budget=budget)


def test_a_budget_that_the_layers_cannot_use_is_an_error_before_injection():
    with pytest.raises(ShapeError, match=r"10 trained numbers cannot be kept by 14 layers"):
        allocated(LoraOneConfig, budget=10)


@every_allocation
def test_the_least_and_the_largest_rank_are_kept(method, allocation):
    ranks = ranks_of(allocated(method, allocation, rho=4, min_rank=3, max_rank=5))
    assert sum(ranks.values()) == 4 * 14
    assert {min(ranks.values()), max(ranks.values())} == {3, 5}


@every_allocation
def test_a_least_rank_of_r_is_the_uniform_allocation(method, allocation):
    assert set(ranks_of(allocated(method, allocation, min_rank=4)).values()) == {4}


@every_method
def test_a_rank_pattern_is_the_budget_and_the_offer(method, tmp_path):
    # The second is a name that the result will be written under; PEFT sorts the first before it.
    pattern = {r".*\.q_proj": 2, r"^model\.layers\.1\.mlp\.up_proj": 6}
    alphas = {"(k|q)_proj": 5}
    peft_model = allocated(method, rank_pattern=pattern, alpha_pattern=alphas, min_rank=1)
    ranks = ranks_of(peft_model)
    for name, layer in peft_model.get_base_model().named_modules():
        if name in ranks:
            r = 2 if "q_proj" in name else 6 if "1.mlp.up_proj" in name else 4
            alpha = 5 if name.endswith(("k_proj", "q_proj")) else 8
            assert layer.scaling["default"] == pytest.approx(alpha / r), name
    peft_model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(pico_llama(), tmp_path)
    assert relative_error(logits(plain), logits(peft_model)) <= 1e-5
    assert sum(ranks.values()) == 2 * 2 + 6 + 11 * 4
    assert all(r <= 4 for n, r in ranks.items() if n.endswith("q_proj"))
    assert max(ranks.values()) <= 12


def test_offers_are_limited_by_the_layer_by_rho_and_by_the_largest_rank():
    def offer(method, shape=(48, 48), r=4, **options):
        target = Target("x", nn.Linear(1, 1), shape, r, r, 8.0)
        return offered_rank(target, config_of(method, **options))

    assert offer(EvaConfig) == offer(LoraGAConfig) == 8
    assert offer(EvaConfig, rho=1.3) == 6  # rounded up
    assert offer(EvaConfig, rho=1.0) == offer(LoraGAConfig, allocation="uniform") == 4
    assert offer(EvaConfig, max_rank=5) == 5
    assert offer(EvaConfig, (2, 48)) == 2  # more would add nothing
    assert offer(LoraOneConfig, (6, 48)) == 6
    assert offer(LoraGAConfig, (11, 48)) == 5  # two triplets a rank


def test_ranks_go_to_the_largest_scores():
    """LoRA-GA adds two triplets with each rank; EVA and LoRA-One one."""
    for method, per_rank in ((LoraOneConfig, 1), (LoraGAConfig, 2)):
        for allocation in ("explained_variance", "gradient_energy"):
            result = calibrate(pico_llama(), config_of(method, allocation), quiet(token_batches()))
            ranks = ranks_of(allocated(method, allocation, calibration=result))
            scores = {}
            for name, t in result.triplets.items():
                gains = t.S.double().square().unflatten(0, (-1, per_rank)).sum(1)
                whole = allocation == "gradient_energy"
                scores[name] = gains if whole else gains / result.energy[name]
            least_kept = min(scores[n][r - 1] for n, r in ranks.items() if r > 1)
            most_left = max(scores[n][r] for n, r in ranks.items() if r < 8)
            assert least_kept >= most_left


@pytest.mark.parametrize("method", GRADIENT_METHODS, ids=lambda m: m.method)
def test_energy_and_explained_variance_are_different_questions(method):
    explained = ranks_of(allocated(method, "explained_variance"))
    energy = ranks_of(allocated(method, "gradient_energy"))
    assert explained != energy
    assert sum(explained.values()) == sum(energy.values())


@pytest.mark.parametrize("method", GRADIENT_METHODS, ids=lambda m: m.method)
@pytest.mark.parametrize("use_rslora", [False, True])
def test_scalings_stay_where_gradients_share_the_ranks(method, use_rslora):
    peft_model = allocated(method, use_rslora=use_rslora)
    for module in peft_model.modules():
        if "default" in getattr(module, "lora_A", {}):
            assert module.scaling["default"] == pytest.approx(8 / (2 if use_rslora else 4))


@pytest.mark.parametrize("method", GRADIENT_METHODS, ids=lambda m: m.method)
def test_lora_ga_stays_neutral_and_lora_one_still_lowers_the_loss(method):
    peft_model = allocated(method)
    if method is LoraGAConfig:
        assert relative_error(logits(peft_model), logits(pico_llama())) <= 1e-5
    else:
        step = peft_model.base_model.init_report["default"].step
        assert step.loss_after < step.loss_before


# Where the result is written ---------------------------------------------------------------------


@every_allocation
def test_ranks_are_anchored_full_names_that_live_everywhere(method, allocation, tmp_path):
    user = config_of(method, allocation)
    peft_model = get_peft_model(pico_llama(), user)
    assert peft_model.peft_config["default"] is user
    assert not user.rank_pattern  # options stay what the user set
    config, ranks = user.saved_config(records_of(peft_model)["default"]), ranks_of(peft_model)
    changed = {n for n, r in without_zeros(ranks).items() if r != 4}
    assert config.rank_pattern.keys() == config.alpha_pattern.keys() == changed
    assert json.loads(json.dumps(ranks)) == ranks

    steps(peft_model)
    want = logits(peft_model)
    peft_model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(pico_llama(), tmp_path)
    growth = 2 if method is LoraGAConfig else 1
    assert type(plain.peft_config["default"]) is LoraConfig
    assert live_ranks(plain) == {n: growth * r for n, r in without_zeros(ranks).items()}
    assert relative_error(logits(plain), want) <= 1e-5

    restored = load_for_training(pico_llama(), tmp_path)
    assert ranks_of(restored) == ranks
    assert live_ranks(restored) == without_zeros(ranks)
    assert torch.equal(logits(restored), want)
    losses = steps(restored, n=7)  # three batches: the last is the first
    assert losses[-1] < losses[0]
    restored.save_pretrained(tmp_path / "again")
    again = PeftModel.from_pretrained(pico_llama(), tmp_path / "again")
    assert relative_error(logits(again), logits(restored)) <= 1e-5

    assert relative_error(logits(peft_model.merge_and_unload()), want) <= 1e-5


class Nested(nn.Module):
    """Modules whose full names end in each other's: `proj` and `block.proj`."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.proj = nn.Linear(16, 16)
        self.block = nn.Module()
        self.block.proj = nn.Linear(16, 16)
        self.block.other = nn.Linear(16, 16)

    def forward(self, x):
        return self.block.other(self.proj(x) + self.block.proj(x[..., :1] * self.rank_one))

    rank_one = torch.ones(16)


@pytest.mark.parametrize(
    "excluded", [None, ["other"], r".*\.other", r"block\.other|nothing"], ids=str
)
def test_a_layer_without_ranks_takes_none_with_it(excluded, tmp_path):
    """`proj` gets no rank; as an entry of a list it would exclude `block.proj`, too."""
    torch.manual_seed(1)
    x = torch.randn(64, 16)
    config = EvaConfig(
        r=1,
        target_modules=["proj", "other"],
        exclude_modules=excluded,
        calibration=quiet([(x,)]),
    )
    model = Nested()
    with torch.no_grad():  # two directions of about the same variance into block.proj
        model.forward = lambda x: model.block.other(
            model.proj(x) + model.block.proj(torch.cat([x[:, :2], 0 * x[:, 2:]], dim=1))
        )
    peft_model = get_peft_model(model, config)
    ranks = ranks_of(peft_model)
    assert ranks["proj"] == 0
    assert ranks["block.proj"] == 2
    assert ("block.other" in ranks) == (excluded is None)
    assert live_ranks(peft_model) == without_zeros(ranks)
    peft_model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(Nested(), tmp_path)
    assert live_ranks(plain) == without_zeros(ranks)


# What cannot work --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_allocation": "fair"}, "rank_allocation must be one of"),
        ({"rho": 0.5}, "rho must be a number of at least 1, got 0.5"),
        ({"rho": "2"}, "rho must be a number of at least 1, got '2'"),
        ({"rho": math.inf}, "rho must be a number"),
        ({"rho": math.nan}, "rho must be a number"),
        ({"rho": True}, "rho must be a number"),
        ({"min_rank": -1}, "min_rank must be between 0 and r=8, got -1"),
        ({"min_rank": 9}, "min_rank must be between 0 and r=8, got 9"),
        ({"min_rank": 1.5}, r"min_rank must be between 0 and r=8, got 1\.5"),
        ({"min_rank": True}, "min_rank must be between 0 and r=8, got True"),
        ({"r": 1, "max_rank": True}, "max_rank must be an integer of at least r=1, got True"),
        ({"max_rank": 7}, "max_rank must be an integer of at least r=8, got 7"),
        ({"max_rank": 9.5}, "max_rank must be an integer"),
    ],
    ids=str,
)
@every_method
def test_options_that_cannot_work_are_refused(method, options, message):
    with pytest.raises(ConfigError, match=f"{method.__name__}: {message}"):
        method(**options)


@every_method
@pytest.mark.parametrize("pattern", ["q_proj", r".*\.q_proj"])
def test_a_rank_above_the_largest_is_refused_before_anything_is_read(method, pattern):
    with pytest.raises(
        ConfigError, match=r"rank_pattern\[.*\] must be at most max_rank=10, got 12"
    ):
        method(rank_pattern={"v_proj": 10, pattern: 12}, max_rank=10)
    assert method(rank_pattern={pattern: 12}, max_rank=12).max_rank == 12


@every_method
def test_an_allocated_config_can_be_made_again(method, tmp_path):
    """Its patterns are within the limits that it was allocated under."""
    model = allocated(method, rho=4, max_rank=6)
    model.save_pretrained(tmp_path)
    config = load_for_training(pico_llama(), tmp_path).peft_config["default"]
    assert config.rank_pattern
    again = dataclasses.replace(config, calibration=quiet(token_batches()))
    assert again.rank_pattern == config.rank_pattern


def test_eva_measures_no_gradient_energy():
    with pytest.raises(
        ConfigError,
        match=r"EvaConfig measures inputs, which serves rank_allocation in .*'explained_variance'",
    ):
        EvaConfig(rank_allocation="gradient_energy")


def test_limits_that_the_budget_cannot_keep_leave_the_model_as_it_was():
    model = pico_llama()
    pattern = {"q_proj": 1}
    with pytest.raises(ShapeError, match="min_rank=3"):
        allocated(LoraOneConfig, model=model, rank_pattern=pattern, min_rank=3)
    assert torch.equal(logits(model), logits(pico_llama()))
    assert not any("lora_" in n for n, _ in model.named_parameters())


# Saved results -----------------------------------------------------------------------------------


@every_allocation
def test_a_saved_result_serves_the_same_offer_only(method, allocation, tmp_path):
    config = config_of(method, allocation)
    result = calibrate(pico_llama(), config, quiet(token_batches()))
    path = result.save(tmp_path)
    assert isinstance(CalibrationResult.load(path), CalibrationResult)

    live = allocated(method, allocation)
    again = allocated(method, allocation, calibration=path)
    assert ranks_of(again) == ranks_of(live)
    assert torch.equal(logits(again), logits(live))
    with pytest.raises(FingerprintError, match="target"):
        allocated(method, "uniform", calibration=path)
    with pytest.raises(FingerprintError, match="target"):
        allocated(method, allocation, calibration=path, rho=3)


def test_one_result_of_gradients_serves_both_allocations():
    result = calibrate(pico_llama(), config_of(LoraOneConfig), quiet(token_batches()))
    energy = allocated(LoraOneConfig, "gradient_energy", calibration=result)
    assert ranks_of(energy) == ranks_of(allocated(LoraOneConfig, "gradient_energy"))


def test_flags_of_a_regular_expression_stay_its_own():
    peft_model = allocated(LoraOneConfig, min_rank=0, exclude_modules=r"(?i).*LAYERS\.0\.mlp.*")
    assert not [name for name in live_ranks(peft_model) if "layers.0.mlp" in name]
    assert [name for name in live_ranks(peft_model) if "layers.1.mlp" in name]


def test_a_whole_number_of_numbers_may_be_written_as_yaml_reads_it():
    counts = [
        n_trained(allocated(LoraOneConfig, "gradient_energy", budget=budget))
        for budget in (4e3, 4000)
    ]
    assert counts[0] == counts[1] <= 4000
