"""The table of optimisers, each of their modes a row, and small models to step with them."""

import dataclasses
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_gradinit import pairs
from peft_gradinit.optim import LoraMuon, LoraOne, LoraPro, LoraRite, PairOptimizer

EXACT = 1e-12
"""Dampening that is not seen in float64."""


@dataclasses.dataclass(frozen=True)
class Row:
    """An optimiser in one of its modes.

    `invariant`: whether steps of the product do not depend on how it is split into factors: `"exact"`,
    `"first order"` in the rate, or not (`""`). `state`: numbers kept over Adam's, at most.
    """

    kind: type[PairOptimizer]
    lr: float
    invariant: str
    state: float
    options: dict[str, Any] = dataclasses.field(default_factory=dict)

    def make(self, model: nn.Module, **options: Any) -> PairOptimizer:
        return self.kind(model, **{"lr": self.lr, **self.options, **options})


ROWS = {
    "lora_muon": Row(LoraMuon, 0.03, "exact", 0.5),
    "lora_muon-plain": Row(LoraMuon, 0.03, "exact", 0.5, {"nesterov": False}),
    "lora_rite": Row(LoraRite, 3e-3, "exact", 0.75),  # of pairs so small that `(r, r)` counts
    "lora_one-gd": Row(LoraOne, 0.1, "exact", 0, {"mode": "gd"}),
    "lora_one-adamw": Row(LoraOne, 3e-3, "", 1, {"mode": "adamw"}),
    "lora_pro-full": Row(LoraPro, 3e-3, "first order", float("inf"), {"mode": "full"}),
    "lora_pro-efficient": Row(LoraPro, 3e-3, "", 1, {"mode": "efficient"}),
}
every_row = pytest.mark.parametrize("row", list(ROWS.values()), ids=list(ROWS))


class Toy(nn.Module):
    """Two layers of one shape, one of another, and a head that may train whole."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = nn.Linear(12, 12)
        self.third = nn.Linear(12, 20)
        self.head = nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(torch.tanh(self.third(h)))


def toy(*, b: float = 0.3, dtype: torch.dtype = torch.float32, **options: Any):
    """A LoRA on three layers; the factors `B` are normal numbers times `b`."""
    torch.manual_seed(0)
    values: dict[str, Any] = {
        "r": 3,
        "lora_alpha": 6,
        "target_modules": ["first", "second", "third"],
    }
    model = get_peft_model(Toy(), LoraConfig(**{**values, **options}))
    for pair in pairs(model):
        nn.init.normal_(pair.B, std=b) if b else nn.init.zeros_(pair.B)
    return model.to(dtype)


def loss_of(model: nn.Module, step: int) -> Tensor:
    """A loss of other data at every step."""
    generator = torch.Generator().manual_seed(step)
    p = next(model.parameters())
    x = torch.randn(16, 12, generator=generator).to(p.dtype)
    y = torch.randn(16, 3, generator=generator).to(p.dtype)
    return (model(x) - y).square().mean()


def run(model: nn.Module, optimizer: torch.optim.Optimizer, n: int = 4, first: int = 0) -> None:
    """Some training steps."""
    for step in range(first, first + n):
        loss_of(model, step).backward()
        optimizer.step()
        optimizer.zero_grad()


def factors(model: nn.Module) -> list[Tensor]:
    """Copies of all factors."""
    return [f.detach().clone() for p in pairs(model) for f in (p.A, p.B)]


def products(model: nn.Module) -> list[Tensor]:
    """`s B A` of every pair."""
    return [(p.scaling * p.B @ p.A).detach() for p in pairs(model)]


def trained(model: nn.Module) -> list[Tensor]:
    """Copies of all that trains."""
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def set_gradients(model: nn.Module, make: Any) -> None:
    """A gradient for everything that trains."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.grad = make(parameter)
