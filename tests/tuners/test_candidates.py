"""Layers that are narrow, that the data do not reach, or that are many experts, share ranks as others do."""

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_gradinit import (
    Calibration,
    EvaConfig,
    LoraGAConfig,
    LoraOneConfig,
    calibrate,
    init_report,
)
from peft_gradinit.errors import ConfigError, ShapeError
from peft_gradinit.linalg import allocate_ranks
from tests.helpers import pico_llama, quiet, token_batches
from tests.moe.models import mixtral, qwen3_moe

METHODS = (LoraGAConfig, LoraOneConfig, EvaConfig)
every_method = pytest.mark.parametrize("method", METHODS, ids=lambda m: m.method)


class Gated(nn.Module):
    """A gate of one output, a head of two, and a tower that no batch reaches."""

    def __init__(self, n_unreached=0):
        super().__init__()
        self.up, self.gate, self.head = nn.Linear(64, 64), nn.Linear(64, 1), nn.Linear(64, 2)
        self.tower = nn.ModuleList(nn.Linear(64, 64) for _ in range(n_unreached))

    def forward(self, x):
        return self.head(torch.relu(self.up(x)) * torch.sigmoid(self.gate(x)))


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 64, generator=generator)
    y = torch.randint(0, 2, (256,), generator=generator)
    loss = lambda model, batch: nn.functional.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    return Calibration([(x, y)], loss_fn=loss, progress=False)


def ranks_of(method, model=None, **options):
    torch.manual_seed(0)
    values = {"r": 8, "target_modules": "auto", "calibration": data()}
    model = get_peft_model(model or Gated(), method(**{**values, **options}))
    return init_report(model).ranks()


@every_method
@pytest.mark.parametrize("targets", ["auto", ["up", "gate", "head"]], ids=["auto", "named"])
def test_no_layer_gets_more_ranks_than_it_has_outputs(method, targets):
    if targets != "auto" and method is LoraGAConfig:
        targets = ["up", "head"]  # it refuses the gate by name, which it cannot start
    options = {} if targets == "auto" else {"rank_allocation": "explained_variance"}
    ranks = ranks_of(method, target_modules=targets, **options)
    assert ranks.get("gate", 0) <= 1
    assert ranks["head"] <= 2
    assert ranks["up"] >= 8


def test_a_layer_that_no_rank_of_the_method_fits_is_no_candidate():
    assert ranks_of(LoraGAConfig)["gate"] == 0


@pytest.mark.parametrize(
    "options",
    [{}, {"max_rank": 8}, {"rho": 1}, {"rank_allocation": "uniform", "budget": "ranks"}],
    ids=str,
)
@pytest.mark.parametrize("n_unreached", [1, 12])
@pytest.mark.filterwarnings("ignore:LoRA-One needs 8 singular directions")
def test_automatic_targets_that_are_not_reached_get_nothing(options, n_unreached):
    ranks = ranks_of(LoraOneConfig, Gated(n_unreached), **options)
    tower = {name: r for name, r in ranks.items() if name.startswith("tower")}
    assert set(tower.values()) == {0}
    assert len(tower) == n_unreached
    assert ranks["up"] >= 8


@pytest.mark.parametrize("r", [2, 4])
def test_a_largest_rank_below_what_fused_experts_ask_for_is_kept(r):
    options = {"target_modules": "auto", "task_type": "CAUSAL_LM", "max_rank": r, "r": r}
    config = LoraOneConfig(**options, calibration=quiet(token_batches()))
    assert max(init_report(get_peft_model(mixtral(), config)).ranks().values()) == r


def test_the_least_rank_is_that_of_the_layer_where_it_is_narrow():
    ranks = ranks_of(
        LoraOneConfig,
        target_modules=["up", "head"],
        rank_allocation="gradient_energy",
        min_rank=4,
    )
    assert ranks["head"] == 2
    assert ranks["up"] >= 4


def test_a_budget_of_no_rank_is_refused_with_what_one_takes():
    with pytest.raises(ConfigError, match=r"budget=10 is 10 trained numbers, and a rank takes 65"):
        ranks_of(LoraOneConfig, budget=10)
    with pytest.raises(ShapeError, match="cannot be kept"):
        ranks_of(LoraOneConfig, budget=10**6)


def test_what_experts_gain_adds_up_where_each_of_them_pays():
    options = {"r": 2, "rho": 16, "min_rank": 0, "budget": 16_000, "task_type": "CAUSAL_LM"}
    options |= {"target_modules": "all-linear", "rank_allocation": "gradient_energy"}
    base = qwen3_moe(num_experts=16)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            parameter.mul_(2.0 if "experts" in name else 1.0)
    result = calibrate(base, LoraOneConfig(**options), quiet(token_batches(48)))
    ranks = init_report(get_peft_model(base, LoraOneConfig(**options, calibration=result))).ranks()
    gains, costs, got = {}, {}, {}
    for name, (out_features, in_features, _) in result.fingerprint.targets.items():
        parameter = name.partition("[")[0]
        costs[parameter] = costs.get(parameter, 0) + out_features + in_features
        got[parameter] = ranks[name]
        if name in result.readouts:
            gain = result.readouts[name]["S"].double().square()
            gains[parameter] = gains.get(parameter, 0) + gain
    offered = {name: gain[:32] for name, gain in gains.items()}
    want = allocate_ranks(offered, 16_000, costs=costs)
    assert sum(gains[n][: got[n]].sum().item() for n in want) == pytest.approx(
        sum(gains[n][:r].sum().item() for n, r in want.items()), rel=1e-3
    )


def test_budgets_of_ranks_stay_what_they_were():
    """There a parameter with experts counts once, and so does its mean expert."""
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = EvaConfig(**options, rho=2, calibration=quiet(token_batches()))
    ranks = init_report(get_peft_model(pico_llama(), config)).ranks()
    assert sum(ranks.values()) == 4 * 14
