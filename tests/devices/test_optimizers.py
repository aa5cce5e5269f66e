"""Every optimiser on a device takes the steps that it takes on the CPU."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from tests.devices.backend import Counts, counted, without
from tests.devices.models import ONE, OTHER, trained, worst
from tests.optim.rows import every_row, toy

pytestmark = pytest.mark.slow

STEP = 2e-3
"""Relative difference of factors after some steps. Inverse roots are computed otherwise on a device:
by products alone, where the CPU decomposes."""

LAYERS = ("first", "second", "third", "head")


def over_two(model: nn.Module) -> nn.Module:
    """Two layers on one device and two on the other, whose inputs are moved to them."""
    base = model.base_model.model
    for name, device in zip(LAYERS, (ONE, OTHER, OTHER, ONE), strict=True):
        layer = getattr(base, name).to(device)
        layer.register_forward_pre_hook(lambda _, args, to=device: args[0].to(to))
    return model


PLACES = {"one device": lambda m: m.to(ONE), "the second": lambda m: m.to(OTHER), "two": over_two}
every_place = pytest.mark.parametrize("place", PLACES)


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(16, 12, generator=generator), torch.randn(16, 3, generator=generator)


def loss_of(model: nn.Module, step: int) -> Tensor:
    x, y = batch(step)
    parameter = next(model.parameters())
    out = model(x.to(parameter))
    return (out - y.to(out)).square().mean()


def run(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


@every_row
@every_place
@pytest.mark.parametrize("whole", [False, True])
def test_steps_are_those_of_the_cpu(row, place, whole):
    options = {"modules_to_save": ["head"]} if whole else {}
    here, there = toy(**options), PLACES[place](toy(**options))
    for model in (here, there):
        run(model, row.make(model, **({"head_lr": 1e-3} if whole else {})), range(5))
    assert worst(trained(there), trained(here)) < STEP


@every_row
@every_place
def test_without_float64_and_eigh(row, place):
    here, there = toy(), PLACES[place](toy())
    run(here, row.make(here), range(5))
    with without("aten::_linalg_eigh", float64=False):
        run(there, row.make(there), range(5))
    assert worst(trained(there), trained(here)) < STEP


@every_row
def test_a_state_moves_to_another_device(row):
    model = toy().to(ONE)
    optimizer = row.make(model)
    run(model, optimizer, range(3))
    other = copy.deepcopy(model).to(OTHER)
    resumed = row.make(other)
    resumed.load_state_dict(optimizer.state_dict())
    for of, by in ((model, optimizer), (other, resumed)):
        run(of, by, range(3, 6))
    assert worst(trained(other), trained(model)) < 1e-5


@every_row
def test_half_precision_factors_have_masters_on_the_device(row):
    here, there = toy(dtype=torch.bfloat16), toy(dtype=torch.bfloat16).to(OTHER)
    for model in (here, there):
        run(model, row.make(model), range(3))
    assert worst(trained(there), trained(here)) < 0.02


@every_row
@pytest.mark.parametrize("default", [torch.bfloat16, torch.float64])
def test_default_device_and_dtype_are_the_users(row, default):
    here, there = toy(), toy().to(OTHER)
    run(here, row.make(here), range(4))
    batches = [[part.to(OTHER) for part in batch(step)] for step in range(4)]
    torch.set_default_device(OTHER)
    torch.set_default_dtype(default)
    try:
        optimizer = row.make(there)
        for x, y in batches:
            (there(x) - y).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    assert worst(trained(there), trained(here)) < STEP


def work_of_a_step(row, n_layers: int) -> Counts:
    """Of a model with so many equal layers."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(12, 12) for _ in range(n_layers)))
    targets = [str(i) for i in range(n_layers)]
    model = get_peft_model(base, LoraConfig(r=3, target_modules=targets)).to(ONE)
    optimizer = row.make(model)
    x = torch.randn(16, 12, device=ONE)
    for _ in range(2):
        model(x).square().mean().backward()
        with counted() as counts:
            optimizer.step()
        optimizer.zero_grad()
    return counts


@every_row
def test_a_step_waits_for_no_pair_and_stacks_their_products(row):
    few, many = work_of_a_step(row, 2), work_of_a_step(row, 12)
    # LoRA-Pro solves a Sylvester equation on the CPU, once for all pairs of one shape.
    assert many.waits == few.waits <= 6
    assert many.kernels - few.kernels <= 6 * 10  # copies into the stacks and out of them
    assert few.kernels < 1000
