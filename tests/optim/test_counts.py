"""Moments are those of the steps that were taken: each factor and each expert counts its own."""

import copy
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from peft_gradinit import pairs
from tests.moe.models import mixtral
from tests.optim.rows import every_row, factors, run, same, toy
from tests.optim.test_models import EXPERTS


def normal(*shape, step):
    generator = torch.Generator().manual_seed(step)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@every_row
@pytest.mark.filterwarnings("ignore")
def test_an_expert_that_is_reached_late_steps_as_a_pair_that_begins_then(row):
    torch.manual_seed(1)
    model = get_peft_model(mixtral(), LoraConfig(**EXPERTS)).double()
    (pair, *_) = pairs(model)
    nn.init.normal_(pair.B, std=0.1)
    out, columns = pair.B.shape[0], pair.A.shape[1]
    alone = get_peft_model(
        nn.Sequential(nn.Linear(columns, out)),
        LoraConfig(r=2, lora_alpha=4, target_modules=["0"]),
    ).double()
    (late,) = pairs(alone)
    late.A.data, late.B.data = (f.detach().clone() for f in pair.matrices()[1])
    whole, own = row.make(model, lr=1e-3), row.make(alone, lr=1e-3)
    for step in range(8):
        of_A = normal(pair.n_experts, 2, columns, step=step)
        of_B = normal(out, 2, pair.n_experts, step=100 + step)
        if step < 5:
            of_A[1], of_B[:, :, 1] = 0, 0
        pair.A.grad, pair.B.grad = of_A.flatten(0, 1), of_B.flatten(1)
        whole.step()
        if step >= 5:
            late.A.grad, late.B.grad = of_A[1].clone(), of_B[:, :, 1].clone()
            own.step()
    for got, want in zip(pair.matrices()[1], (late.A, late.B), strict=True):
        torch.testing.assert_close(got, want.detach(), rtol=1e-6, atol=1e-9)
    assert whole.state[pair.A]["step"].tolist() == [8, 3, 8, 8]


@every_row
@pytest.mark.filterwarnings("ignore")
def test_counts_of_experts_are_resumed(row):
    def train(model, optimizer, first, n):
        for step in range(first, first + n):
            for pair in pairs(model):
                pair.A.grad = normal(*pair.A.shape, step=step).float()
                pair.B.grad = normal(*pair.B.shape, step=50 + step).float()
            optimizer.step()

    torch.manual_seed(1)
    model = get_peft_model(mixtral(), LoraConfig(**EXPERTS))
    optimizer = row.make(model)
    train(model, optimizer, 0, 3)
    other = copy.deepcopy(model)
    again = row.make(other)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other, again)):
        train(m, o, 3, 2)
    assert same(factors(model), factors(other))


@every_row
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_factor_that_rests_keeps_its_state(row, side):
    """Constant gradients of the pair, those of one factor in every other step."""
    model = toy(dtype=torch.float64)
    optimizer = row.make(model, lr=0.0)
    (pair, *_) = pairs(model)
    factor = getattr(pair, side)
    gradients = [torch.randn_like(f) for f in (pair.A, pair.B)]
    kept = []
    for step in range(4):
        pair.A.grad, pair.B.grad = (g.clone() for g in gradients)
        if step % 2:
            factor.grad = None
        optimizer.step()
        kept.append(copy.deepcopy(optimizer.state[factor]))
    if row.options.get("mode") == "full" and side == "B":
        assert [entries["step"] for entries in kept] == [1, 2, 3, 4]  # of the weight's moments
        return
    assert [entries["step"] for entries in kept] == [1, 1, 2, 2]
    for moved, rested in ((0, 1), (2, 3)):
        for name in kept[0].keys() - {"step"}:  # LoRA-RITE turns them, within its dampening
            torch.testing.assert_close(kept[moved][name], kept[rested][name], rtol=1e-4, atol=1e-6)


@every_row
@pytest.mark.parametrize("side", ["A", "B"])
def test_a_factor_that_is_freed_late_steps_as_a_fresh_one(row, side):
    if row.options.get("mode") == "full":
        pytest.skip("its moments are of the weight, and not of a factor")
    model = toy(dtype=torch.float64)
    optimizer = row.make(model, lr=1e-4)
    (pair, *_) = pairs(model)
    for _ in range(20):
        pair.A.grad, pair.B.grad = torch.randn_like(pair.A), torch.randn_like(pair.B)
        getattr(pair, side).grad = None
        optimizer.step()
    fresh = copy.deepcopy(model)
    (other, *_) = pairs(fresh)
    gradient = torch.randn_like(getattr(pair, side))
    moved = []
    for p, o in ((pair, optimizer), (other, row.make(fresh, lr=1e-4))):
        p.A.grad = p.B.grad = None
        factor = getattr(p, side)
        factor.grad = gradient.clone()
        before = factor.detach().clone()
        o.step()
        moved.append(factor.detach() - before)
    torch.testing.assert_close(*moved)


@every_row
def test_a_frozen_factor_does_not_cost_the_count_of_a_checkpoint_of_torch_distributed(row):
    """It restores no state of parameters that do not train."""
    if not row.state:
        pytest.skip("an optimiser without a state has none to load")

    def frozen():
        model = toy()
        for pair in pairs(model):
            pair.A.requires_grad_(False)
        return model, row.make(model)

    model, optimizer = frozen()
    run(model, optimizer, 30)
    kept = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other, again = frozen()
    other.load_state_dict(model.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_optimizer_state_dict(other, again, kept)
    for m, o in ((model, optimizer), (other, again)):
        run(m, o, 3, first=30)
    assert same(factors(model), factors(other))


@every_row
def test_a_count_that_comes_back_as_a_tensor_goes_on(row):
    model = toy()
    optimizer = row.make(model)
    run(model, optimizer, 2)
    other = copy.deepcopy(model)
    again = row.make(other)
    kept = copy.deepcopy(optimizer.state_dict())
    for entries in kept["state"].values():
        entries["step"] = torch.tensor(entries["step"])
    again.load_state_dict(kept)
    for m, o in ((model, optimizer), (other, again)):
        run(m, o, 2, first=2)
    assert same(factors(model), factors(other))
