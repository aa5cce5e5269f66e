"""Learning rates from lengths of factors."""

import math

import pytest
import torch

from peft_gradinit.linalg import first_moves, lora_rate, rate_of_start, spectral_rate

OUT, IN, R, S = 200, 120, 8, 1.7


def plain_start(seed=0):
    """Factors as PEFT's LoRA draws them."""
    generator = torch.Generator().manual_seed(seed)
    A = (2 * torch.rand(R, IN, generator=generator) - 1) / math.sqrt(IN)
    return A, torch.zeros(OUT, R)


def moved_by_adam(A, B, scaling, lr=1e-6):
    """Root mean square of the change of `s B A` in one step of Adam, over the rate."""
    torch.manual_seed(1)
    factors = [torch.nn.Parameter(A.double()), torch.nn.Parameter(B.double())]
    before = factors[1].detach() @ factors[0].detach()
    for factor in factors:
        factor.grad = torch.randn_like(factor)
    torch.optim.Adam(factors, lr=lr).step()
    change = scaling * (factors[1].detach() @ factors[0].detach() - before)
    return (change.square().mean().sqrt() / lr).item()


@pytest.mark.parametrize("lengths", [(1.0, 0.0), (1.0, 1.0), (0.1, 2.0), (0.0, 1.0)])
def test_first_move_is_that_of_adam(lengths):
    generator = torch.Generator().manual_seed(0)
    A = lengths[0] * torch.randn(R, IN, generator=generator)
    B = lengths[1] * torch.randn(OUT, R, generator=generator)
    moved = first_moves(A, B, S).norm().item()
    # 5 %: signs of 24,000 entries do not cancel exactly
    assert moved == pytest.approx(moved_by_adam(A, B, S), rel=0.05)


def test_plain_loras_start_gets_plain_loras_rate():
    assert rate_of_start(*plain_start(), S) == pytest.approx(lora_rate(IN, R, S), rel=0.05)


@pytest.mark.parametrize("factor", [2.0, 10.0])
def test_a_start_that_moves_faster_gets_a_rate_that_is_lower_by_the_square(factor):
    A, B = plain_start()
    rate = rate_of_start(factor * A, B, S)
    assert torch.allclose(first_moves(factor * A, B, S), factor * first_moves(A, B, S))
    assert rate == pytest.approx(lora_rate(IN, R, S) / factor**2, rel=0.1)


@pytest.mark.parametrize("times", [10.0, 1e3])
def test_one_long_rank_does_not_lower_the_rate_of_all(times):
    """As for a direction of large inputs; half of the ranks do."""
    A, B = plain_start()
    A, B = 2 * A, torch.zeros_like(B)
    A[0] *= times
    B[:, 0] = times
    want = lora_rate(IN, R, S) / 4
    assert rate_of_start(A, B, S) == pytest.approx(want, rel=0.1)
    A[: R // 2 + 1] *= times
    assert rate_of_start(A, B, S) < want / 50


def test_short_starts_keep_plain_loras_rate():
    A, B = plain_start()
    assert rate_of_start(0.01 * A, B, S) == rate_of_start(0 * A, B, S) == lora_rate(IN, R, S)


def test_rates_fall_with_the_root_of_width_and_alpha():
    assert lora_rate(4 * IN, R, S) == pytest.approx(lora_rate(IN, R, S) / 2)
    assert lora_rate(IN, 4 * R, S / 4) == pytest.approx(lora_rate(IN, R, S))
    assert lora_rate(IN, R, -S) == lora_rate(IN, R, S)


def test_spectral_rate_grows_with_the_weight():
    assert spectral_rate(10.0) == pytest.approx(10 * spectral_rate(1.0))
    assert 0 < spectral_rate(1.0) < 0.5  # Adam needs some steps to double a singular value
