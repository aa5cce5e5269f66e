"""What `Trainer` is given, and every error about options."""

import inspect

import numpy as np
import pytest
import torch
from torch import nn

from peft_gradinit.errors import ConfigError
from peft_gradinit.optim import OPTIMIZERS, LoraMuon, LoraOne, LoraRite, optimizer
from tests.optim.rows import ROWS, every_row, toy


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_the_factory_makes_the_optimizer_from_a_model(kind):
    factory, options = optimizer(kind.name, lr=0.01, weight_decay=0.1)
    made = factory()(toy(), **options)
    assert type(made) is kind
    assert made.param_groups[0]["lr"] == made.defaults["lr"] == 0.01
    assert made.param_groups[0]["weight_decay"] == 0.1


def test_options_of_the_method_go_to_the_group_of_the_pairs():
    factory, options = optimizer("lora_muon", lr=0.01, momentum=0.5, dampening=0.1)
    group = factory()(toy(), **options).param_groups[0]
    assert (group["momentum"], group["dampening"], group["nesterov"]) == (0.5, 0.1, True)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lora_moun", {"lr": 1}, r"no optimiser 'lora_moun' \(did you mean 'lora_muon'\?\)"),
        ("adamw", {"lr": 1}, r"there are \['lora_muon', 'lora_rite', 'lora_one', 'lora_pro'\]"),
        ("lora_muon", {"lr": 1, "betas": (0, 0)}, "lora_muon has no option 'betas'"),
        ("lora_pro", {"lr": 1, "head_Ir": 1}, r"\(did you mean 'head_lr'\?\)"),
        ("lora_muon", {}, "lora_muon needs a rate; pass lr"),
        ("lora_rite", {"lr": None}, "lora_rite needs a rate; pass lr"),
    ],
)
def test_wrong_names_are_refused_before_there_is_a_model(name, options, message):
    with pytest.raises(ConfigError, match=message):
        optimizer(name, **options)


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (LoraMuon, {"lr": -1}, "LoRA-Muon: lr must be a number of at least 0, got -1"),
        (LoraMuon, {"lr": float("nan")}, "lr must be a number of at least 0, got nan"),
        (LoraMuon, {}, "LoRA-Muon: lr must be a number of at least 0, got nan"),
        (LoraMuon, {"lr": "1e-3"}, "lr must be a number of at least 0, got '1e-3'"),
        (LoraMuon, {"lr": 1, "head_lr": -1}, "head_lr must be a number of at least 0, got -1"),
        (LoraMuon, {"lr": 0.1, "weight_decay": -1}, "weight_decay must be a number"),
        (LoraMuon, {"lr": 1, "momentum": 1}, "momentum must be at least 0 and below 1, got 1"),
        (LoraMuon, {"lr": 1, "dampening": 2}, "dampening must be at least 0 and below 1, got 2"),
        (LoraRite, {"lr": 1, "betas": (0.9, 1.0)}, r"betas\[1\] must be at least 0 and below 1"),
        (LoraRite, {"lr": 1, "betas": 0.9}, "betas must be two numbers, got 0.9"),
        (LoraOne, {"lr": 1, "eps": -1}, "eps must be at least 0 and below 1, got -1"),
        (LoraMuon, {"lr": None}, "lr must be a number of at least 0, got None"),
        (LoraMuon, {"lr": 1, "weight_decay": None}, "weight_decay must be a number of at least 0"),
        (LoraMuon, {"lr": 1, "nesterov": "false"}, "nesterov must be True or False, got 'false'"),
        (LoraMuon, {"lr": 1, "wieght_decay": 0.1}, r"LoRA-Muon has no option 'wieght_decay' \(did"),
        (LoraMuon, {"lr": 1, "betas": (0.9, 0.95)}, "LoRA-Muon has no option 'betas'; it has"),
        (LoraRite, {"lr": 1, "beta1": 0.9}, r"no option 'beta1' \(did you mean 'betas'\?\)"),
        (LoraMuon, {"lr": 1, "adapter_name": None}, "adapter_name must be a name or a list of"),
        (LoraMuon, {"lr": 1, "adapter_name": ["default", "otehr"]}, r"adapter named \['otehr'\]"),
    ],
)
def test_numbers_without_a_meaning_are_refused(kind, options, message):
    with pytest.raises(ConfigError, match=message):
        kind(toy(), **options)


def test_numbers_of_numpy_are_numbers():
    group = LoraMuon(toy(), lr=np.float32(0.5)).param_groups[0]
    assert (group["lr"], type(group["lr"])) == (0.5, float)


@every_row
def test_options_of_numpy_are_saved_as_numbers(row, tmp_path):
    """Torch loads no NumPy numbers, so a run with them could not be resumed."""
    usual = row.make(toy()).param_groups[0]
    mine = [n for n in inspect.signature(row.kind).parameters if n not in ("model", "common")]
    given = {n: tuple(map(np.float64, v)) for n in mine if isinstance(v := usual[n], tuple)}
    given |= {n: np.float64(v) for n in mine if isinstance(v := usual[n], float)}
    assert len(given) >= 2
    made = row.make(toy(), **given)
    torch.save(made.state_dict(), tmp_path / "optimizer.pt")
    kept = torch.load(tmp_path / "optimizer.pt", weights_only=True)["param_groups"][0]
    assert {n: kept[n] for n in given} == {n: usual[n] for n in given}


@pytest.mark.parametrize("given", [lambda m: m.parameters(), lambda m: [{"params": []}]])
def test_parameters_in_place_of_the_model_are_an_error(given):
    with pytest.raises(ConfigError, match=r"LoRA-Muon is made from the model, .*=optimizer\("):
        LoraMuon(given(toy()), lr=0.1)


def test_a_group_that_is_added_needs_its_rate():
    model = toy()
    optimizer = LoraMuon(model, lr=0.03)
    head = list(model.base_model.model.head.parameters())
    with pytest.raises(ConfigError, match=r"the group names no rate; pass .* make a new optimiser"):
        optimizer.add_param_group({"params": head})
    optimizer.add_param_group({"params": head, "lr": 1e-3})
    before = [p.detach().clone() for p in head]
    for p in head:
        p.grad = torch.ones_like(p)
    optimizer.step()
    for old, p in zip(before, head, strict=True):
        torch.testing.assert_close(old - p.detach(), torch.full_like(p, 1e-3))  # as AdamW's first


def test_what_is_in_no_pair_needs_a_rate():
    model = toy(modules_to_save=["head"], bias="lora_only")
    message = r"LoRA-Muon: \S+first\S*bias, \S+, \S+ and 2 more train as well .* Pass head_lr"
    with pytest.raises(ConfigError, match=message):
        LoraMuon(model, lr=0.1)
    groups = LoraMuon(model, lr=0.1, head_lr=1e-3, head_weight_decay=0.1).param_groups
    assert [g["lr"] for g in groups] == [0.1, 1e-3, 1e-3]
    assert [g["weight_decay"] for g in groups] == [0.0, 0.1, 0.0]
    assert [len(g["params"]) for g in groups] == [6, 1, 4]


def test_a_pair_that_is_multiplied_by_zero_is_an_error():
    model = toy(alpha_pattern={"second": 0})
    with pytest.raises(ConfigError, match="the pair of second has a scaling of 0"):
        LoraMuon(model, lr=0.1)


def test_a_model_without_pairs_is_an_error():
    with pytest.raises(ConfigError, match=r"of adapter_name='default' the model has none"):
        LoraMuon(nn.Linear(3, 3), lr=0.1)
    frozen = toy()
    frozen.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"'nobody' the model has none. .* \['default'\]"):
        LoraMuon(frozen, lr=0.1, adapter_name="nobody")
    with pytest.raises(ConfigError, match="none of them trains"):
        LoraMuon(frozen, lr=0.1)


def test_every_row_has_options_that_the_table_knows():
    for row in ROWS.values():
        optimizer(row.kind.name, lr=row.lr, **row.options)
