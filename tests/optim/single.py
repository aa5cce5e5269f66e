"""One pair in float64 with given gradients, for formulas written down anew."""

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from peft_gradinit import pairs
from peft_gradinit.optim import PairOptimizer

OUT, IN, R, S = 7, 9, 3, 4.0


class One(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(IN, OUT, bias=False)


def single(seed: int = 0):
    """A model with one pair, and the pair."""
    config = LoraConfig(r=R, lora_alpha=int(S * R), target_modules=["layer"])
    model = get_peft_model(One(), config).double()
    pair = next(iter(pairs(model)))
    generator = torch.Generator().manual_seed(seed)
    pair.A.data = torch.randn(R, IN, generator=generator, dtype=torch.float64)
    pair.B.data = torch.randn(OUT, R, generator=generator, dtype=torch.float64)
    return model, pair


def gradient(step: int) -> Tensor:
    """A gradient of the weight."""
    generator = torch.Generator().manual_seed(50 + step)
    return torch.randn(OUT, IN, generator=generator, dtype=torch.float64)


def steps(optimizer: PairOptimizer, pair, n: int) -> list[tuple[Tensor, Tensor]]:
    """`A` and `B` before and after every step along gradients of the weight."""
    found = [(pair.A.detach().clone(), pair.B.detach().clone())]
    for step in range(n):
        g = gradient(step)
        pair.A.grad, pair.B.grad = S * pair.B.detach().T @ g, S * g @ pair.A.detach().T
        optimizer.step()
        found.append((pair.A.detach().clone(), pair.B.detach().clone()))
    return found


def close(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor], tolerance: float = 1e-8) -> None:
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
