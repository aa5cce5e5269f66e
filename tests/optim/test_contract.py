"""What every optimiser promises: each of its modes is a row, and one without a row fails."""

import copy
import inspect
import io
import pickle

import pytest
import torch
from torch import nn

from peft_gradinit import pairs
from peft_gradinit.errors import ConfigError
from peft_gradinit.optim import OPTIMIZERS, LoraMuon, stacks
from tests.helpers import relative_error
from tests.optim.rows import (
    EXACT,
    ROWS,
    every_row,
    factors,
    loss_of,
    products,
    run,
    same,
    set_gradients,
    toy,
    trained,
)


def test_every_optimizer_has_a_row():
    assert {row.kind for row in ROWS.values()} == set(OPTIMIZERS)
    names = [kind.name for kind in OPTIMIZERS]
    assert len(set(names)) == len(names)
    for name, row in ROWS.items():
        assert name.split("-")[0] == row.kind.name
        text = inspect.getmodule(row.kind).__doc__
        assert row.kind.paper in text
        assert row.kind.title in text
        assert "**Departures" in text


# The product is what counts -----------------------------------------------------------------------


def turned(model):
    """The same products of other factors: `M A` and `B M^-1`, with condition numbers from 2 to 63."""
    for i, pair in enumerate(pairs(model)):
        generator = torch.Generator().manual_seed(100 + i)
        M = torch.randn(3, 3, generator=generator, dtype=torch.float64) + 2 * torch.eye(3)
        pair.A.data = M @ pair.A.data
        pair.B.data = pair.B.data @ torch.linalg.inv(M)
    return model


def difference(make, n):
    """Distance of the products after `n` steps of both splits, over the length of the way there."""
    model, other = toy(dtype=torch.float64), turned(toy(dtype=torch.float64))
    start = products(model)
    for m in (model, other):
        run(m, make(m), n)
    ends = zip(start, products(model), products(other), strict=True)
    return max(((b - c).norm() / (b - a).norm()).item() for a, b, c in ends)


@every_row
def test_the_split_into_factors_does_not_count_where_the_row_says_so(row):
    def make(model):
        lr = row.lr if row.invariant == "exact" else 1e-6
        return row.make(model, lr=lr, dampening=EXACT, weight_decay=0.1)

    n = 1 if row.invariant == "first order" else 5
    found = difference(make, n)
    assert found < 1e-4 if row.invariant else found > 0.05


def test_it_does_count_for_adamw():
    def make(model):
        return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-6)

    assert difference(make, 1) > 0.05


@every_row
def test_default_dampening_hardly_makes_it_count(row):
    """`1e-4` of the norm is 0.4 times the smallest eigenvalue in the worst case here."""
    if row.invariant == "exact":
        assert difference(row.make, 5) < (0.15 if row.kind is LoraMuon else 0.01)


@pytest.mark.parametrize("name", ["lora_muon", "lora_rite"])
def test_the_scaling_belongs_to_the_product(name):
    """A scaling of 8 and a `B` of an eighth are the same function and take the same step of it."""
    model, other = toy(dtype=torch.float64), toy(dtype=torch.float64, lora_alpha=24)
    for pair in pairs(other):
        pair.B.data /= 4
    for m in (model, other):
        run(m, ROWS[name].make(m, dampening=EXACT))
    for one, two in zip(products(model), products(other), strict=True):
        assert relative_error(one, two) < 1e-8


@every_row
def test_a_negative_scaling_is_a_negative_factor(row):
    """The same products, with the sign in the scaling or in `B`; neither climbs."""
    ends = []
    for scaling in (2.0, -2.0):
        model = toy(dtype=torch.float64)
        for pair in pairs(model):
            pair.layer.scaling["default"] = scaling
            pair.B.data *= scaling / 2
        run(model, row.make(model, dampening=EXACT))
        ends.append(products(model))
    for one, other in zip(*ends, strict=True):
        assert relative_error(one, other) < 1e-8


# Degenerate cases ----------------------------------------------------------------------------------


@every_row
def test_a_gradient_of_zero_moves_nothing(row):
    model = toy()
    optimizer, before = row.make(model), factors(model)
    for _ in range(3):
        set_gradients(model, torch.zeros_like)
        optimizer.step()
    assert same(before, factors(model))


@every_row
def test_a_rate_of_zero_moves_nothing(row):
    """So that `torch.distributed.checkpoint` can make the state by a step."""
    model = toy()
    optimizer, before = row.make(model, lr=0.0, weight_decay=0.1), factors(model)
    run(model, optimizer, 2)
    assert same(before, factors(model))


@every_row
def test_training_from_zero_moves_B_first_and_then_A(row):
    model = toy(b=0)
    optimizer, before = row.make(model), factors(model)
    run(model, optimizer, 1)
    after = factors(model)
    assert same(before[::2], after[::2])
    assert all(B.any() for B in after[1::2])
    run(model, optimizer, 5, first=1)
    assert all(f.isfinite().all() for f in factors(model))
    assert not any(torch.equal(a, b) for a, b in zip(before, factors(model), strict=True))


def one_row(pair):
    pair.A.data[1:] = pair.A.data[:1]


def one_column(pair):
    pair.B.data[:, 1:] = pair.B.data[:, :1]


def both(pair):
    one_row(pair)
    one_column(pair)


def zero_pair(pair):
    pair.A.data.zero_()
    pair.B.data.zero_()


@every_row
@pytest.mark.parametrize("spoil", [one_row, one_column, both, zero_pair])
def test_factors_of_lower_rank_stay_finite(row, spoil):
    model = toy()
    for pair in pairs(model):
        spoil(pair)
    run(model, row.make(model), 6)
    assert all(f.isfinite().all() for f in factors(model))
    assert all(f.abs().max() < 1e3 for f in factors(model))


@every_row
@pytest.mark.parametrize("of_factors", [1e-20, 1e-8, 1.0, 1e8, 1e15])
@pytest.mark.parametrize("of_gradients", [1e-30, 1e-8, 1.0, 1e8, 1e15])
def test_huge_and_tiny_numbers_stay_finite(row, of_factors, of_gradients):
    model = toy()
    optimizer = row.make(model, lr=1e-6)
    for pair in pairs(model):
        pair.A.data *= of_factors
        pair.B.data *= of_factors
    if row.kind.name == "lora_pro" and max(of_factors, of_gradients) > 1e8:
        pytest.skip("its gradient of the weight, and the square of it, are no float32 numbers")
    for _ in range(3):
        set_gradients(model, lambda p: of_gradients * torch.randn_like(p))
        before = factors(model)
        optimizer.step()
        now = factors(model)
        if of_gradients > 1e8 and "gd" in row.options.values():
            break  # gradient descent goes as far as the gradient says
        assert all(f.isfinite().all() for f in now), (before, now)


@every_row
def test_a_gradient_that_is_not_finite_is_not_hidden(row):
    """As with AdamW: the factors are no numbers any more; and no decomposition fails."""
    model = toy()
    optimizer = row.make(model)
    set_gradients(model, lambda p: torch.full_like(p, float("nan")))
    optimizer.step()
    assert all(f.isnan().any() for f in factors(model))


def test_without_any_gradient_it_is_an_error():
    optimizer = LoraMuon(toy(), lr=0.1)
    with pytest.raises(ConfigError, match="none of its parameters has a gradient"):
        optimizer.step()


@every_row
def test_a_pair_without_gradients_stands_still_and_begins_later(row):
    model, fresh = toy(dtype=torch.float64), toy(dtype=torch.float64)
    optimizer, before = row.make(model), factors(model)
    loss_of(model, 0).backward()
    first, second, _ = pairs(model)
    second.A.grad = second.B.grad = None
    optimizer.step()
    assert same(before[2:4], factors(model)[2:4])
    assert not same(before[:2], factors(model)[:2])
    gradients = [torch.randn_like(f) for f in factors(model)]
    for m, o in ((model, optimizer), (fresh, row.make(fresh))):
        mine = [f for p in pairs(m) for f in (p.A, p.B)]
        for factor, gradient in zip(mine, gradients, strict=True):
            factor.grad = gradient
        o.step()
    assert optimizer.state[first.A]["step"] == 2
    assert optimizer.state[second.A]["step"] == 1
    for got, want in zip(factors(model)[2:4], factors(fresh)[2:4], strict=True):
        torch.testing.assert_close(got, want)


# What a training loop does -------------------------------------------------------------------------


@every_row
def test_the_loss_falls(row):
    model = toy(b=0)
    optimizer = row.make(model)
    with torch.no_grad():
        before = sum(loss_of(model, s) for s in range(3))
    for _ in range(15):
        run(model, optimizer, 3)
    with torch.no_grad():
        assert sum(loss_of(model, s) for s in range(3)) < 0.97 * before


@every_row
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_resuming_goes_on_bit_for_bit(row, dtype):
    def started():
        model = toy(dtype=dtype, modules_to_save=["head"])
        return model, row.make(model, head_lr=1e-2, weight_decay=0.1)

    straight, optimizer = started()
    run(straight, optimizer, 6)
    model, optimizer = started()
    run(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed, optimizer = started()
    resumed.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    run(resumed, optimizer, 3, first=3)
    assert same(trained(straight), trained(resumed))
    assert all(f.dtype == dtype for f in factors(resumed))


@every_row
def test_the_state_is_plain_tensors_by_parameter_and_no_larger_than_adams(row):
    model = toy()
    optimizer = row.make(model)
    run(model, optimizer, 2)
    mine = {id(f) for p in pairs(model) for f in (p.A, p.B)}
    assert {id(p) for p in optimizer.state} == mine
    kept = 0
    for entries in optimizer.state.values():
        assert entries.pop("step") == 2
        assert all(type(e) is torch.Tensor and e.dtype == torch.float32 for e in entries.values())
        kept += sum(e.numel() for e in entries.values())
    assert kept <= row.state * 2 * sum(f.numel() for f in factors(model))


@every_row
def test_optimizers_are_copied_and_pickled(row):
    model = toy()
    optimizer = row.make(model)
    run(model, optimizer, 1)
    for other in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert type(other) is row.kind
        assert len(other.state) == len(optimizer.state)


@every_row
def test_a_schedule_acts_on_all_groups_and_keeps_their_ratio(row):
    model = toy(modules_to_save=["head"])
    optimizer = row.make(model, head_lr=1e-3)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: float(step > 0))
    before = trained(model)
    run(model, optimizer, 1)  # at a rate of zero
    assert same(before, trained(model))
    schedule.step()
    assert [g["lr"] for g in optimizer.param_groups] == [row.lr, 1e-3, 1e-3]
    run(model, optimizer, 1, first=1)
    assert not any(torch.equal(a, b) for a, b in zip(before, trained(model), strict=True))


@every_row
def test_half_the_rate_is_half_the_step(row):
    start, ways = toy(dtype=torch.float64), []
    for lr in (1e-4, 5e-5):
        model = toy(dtype=torch.float64)
        run(model, row.make(model, lr=lr), 1)
        ways.append([b - a for a, b in zip(factors(start), factors(model), strict=True)])
    for whole, half in zip(*ways, strict=True):
        assert relative_error(2 * half, whole) < 1e-6


@every_row
def test_weight_decay_is_decoupled(row):
    """With a gradient of zero, the product shrinks by its own formula, and nothing else happens."""
    model = toy(dtype=torch.float64)
    optimizer, before = row.make(model, lr=0.1, weight_decay=0.5), products(model)
    set_gradients(model, torch.zeros_like)
    optimizer.step()
    shrunk = 0.95 if row.kind is LoraMuon else 0.95**2
    for a, b in zip(before, products(model), strict=True):
        torch.testing.assert_close(b, shrunk * a)


@every_row
def test_a_grad_scaler_skips_what_is_infinite_and_changes_nothing_else(row):
    plain, scaled = toy(), toy()
    optimizer, other = row.make(plain), row.make(scaled)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for step in range(4):
        loss_of(plain, step).backward()
        optimizer.step()
        optimizer.zero_grad()
        scaler.scale(loss_of(scaled, step)).backward()
        scaler.unscale_(other)
        nn.utils.clip_grad_norm_(scaled.parameters(), 1e9)
        scaler.step(other)
        scaler.update()
        other.zero_grad()
    assert same(factors(plain), factors(scaled))
    set_gradients(scaled, lambda p: torch.full_like(p, float("inf")))
    scaler.scale(torch.tensor(1.0))
    scaler.step(other)
    assert same(factors(plain), factors(scaled))


@every_row
def test_accumulated_gradients_are_gradients_of_the_sum(row):
    one, other = toy(dtype=torch.float64), toy(dtype=torch.float64)
    optimizer, accumulating = row.make(one), row.make(other)
    ((loss_of(one, 0) + loss_of(one, 1)) / 2).backward()
    optimizer.step()
    for step in (0, 1):
        (loss_of(other, step) / 2).backward()
    accumulating.step()
    for a, b in zip(factors(one), factors(other), strict=True):
        torch.testing.assert_close(a, b)


@every_row
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_factors_have_float32_masters(row, dtype):
    """Steps too small for bfloat16 add up; the factors are the rounded masters."""
    half = toy(dtype=dtype, modules_to_save=["head"])
    full = toy(dtype=dtype, modules_to_save=["head"]).float()
    lr = row.lr / 100
    makers = [row.make(m, lr=lr, head_lr=1e-4) for m in (half, full)]
    generator = torch.Generator().manual_seed(1)
    start = trained(half)
    for _ in range(20):
        for p, q in zip(half.parameters(), full.parameters(), strict=True):
            if p.requires_grad:
                p.grad = torch.randn(p.shape, generator=generator).to(dtype)
                q.grad = p.grad.float()
        for optimizer in makers:
            optimizer.step()
    assert same(trained(half), [p.to(dtype) for p in trained(full)])
    assert not any(torch.equal(a, b) for a, b in zip(start, trained(half), strict=True))


def test_what_others_write_into_a_half_precision_factor_counts():
    model = toy(dtype=torch.bfloat16)
    optimizer = LoraMuon(model, lr=0.03)
    run(model, optimizer, 2)
    pair = next(iter(pairs(model)))
    pair.A.data.fill_(0.5)
    run(model, optimizer, 1)
    assert (pair.A.float() - 0.5).abs().max() < 0.2


@every_row
def test_a_closure_computes_the_loss_again(row):
    model = toy()
    optimizer, before = row.make(model), factors(model)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0
    assert not same(before, factors(model))


@every_row
def test_stacks_of_bounded_size_take_the_same_steps(row, monkeypatch):
    whole, cut = toy(dtype=torch.float64), toy(dtype=torch.float64)
    run(whole, row.make(whole))
    monkeypatch.setattr(stacks, "ENTRIES", 1)
    run(cut, row.make(cut))
    for a, b in zip(factors(whole), factors(cut), strict=True):
        torch.testing.assert_close(a, b)


# States of others -----------------------------------------------------------------------------------


def test_the_state_of_another_optimiser_is_refused():
    saved = run_and_save(ROWS["lora_rite"])
    with pytest.raises(ConfigError, match=r"LoRA-Muon was given the state of another optimiser"):
        LoraMuon(toy(), lr=0.1).load_state_dict(saved)
    saved = run_and_save(ROWS["lora_one-adamw"])
    with pytest.raises(ConfigError, match=r"has mode='adamw', where LoRA-One has mode='gd'"):
        ROWS["lora_one-gd"].make(toy()).load_state_dict(saved)


@every_row
def test_the_state_of_other_ranks_is_refused_before_a_step(row):
    model, other = toy(), toy(r=2)
    optimizer, again = row.make(model), row.make(other)
    run(model, optimizer, 1)
    saved = optimizer.state_dict()
    if all(layout == "weight" for layout in optimizer.layouts(optimizer.param_groups[0]).values()):
        again.load_state_dict(saved)  # moments of the whole weight know no rank
        run(other, again, 1)
        return
    before = copy.deepcopy(again.state_dict())
    with pytest.raises(ConfigError, match=r"an adapter with other ranks or layers\. Load that"):
        again.load_state_dict(saved)
    assert again.state_dict() == before
    again.load_state_dict(row.make(toy(r=2)).state_dict())


def test_a_state_without_groups_is_refused_by_torch():
    with pytest.raises(ValueError, match="different number of parameter groups"):
        LoraMuon(toy(), lr=0.1).load_state_dict({"state": {}, "param_groups": []})


@every_row
def test_the_scalings_are_those_of_the_model_and_not_those_of_a_state(row):
    model, other = toy(), toy(lora_alpha=24)
    optimizer, again = row.make(model), row.make(other)
    run(model, optimizer, 1)
    state = optimizer.state_dict()
    again.load_state_dict(state)
    assert again.param_groups[0]["scalings"] == [pair.scaling for pair in pairs(other)] == [8.0] * 3
    assert state["param_groups"][0]["scalings"] == [2.0] * 3


def run_and_save(row):
    model = toy()
    optimizer = row.make(model)
    run(model, optimizer, 1)
    return optimizer.state_dict()


@every_row
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.float64), (torch.float64, torch.float32)])
def test_a_state_of_another_precision_goes_on(row, dtypes):
    first, then = dtypes
    model, other = toy(dtype=first), toy(dtype=then)
    optimizer, again = row.make(model), row.make(other)
    run(model, optimizer, 2)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    other.load_state_dict(model.state_dict())
    run(other, again, 2, first=2)
    run(model, optimizer, 2, first=2)
    for got, want in zip(factors(other), factors(model), strict=True):
        assert relative_error(got.double(), want.double()) < 1e-3
