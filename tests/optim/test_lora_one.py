"""LoRA-One's preconditioned step, by hand, with each departure from the deleted code."""

import pytest
import torch

from peft_gradinit.errors import ConfigError
from peft_gradinit.optim import LoraOne
from tests.optim.rows import EXACT, toy
from tests.optim.single import S, close, gradient, single, steps

ETA, DECAY = 0.02, 0.3


def preconditioned(A, B, g):
    return (
        torch.linalg.solve(B.T @ B, S * B.T @ g),
        torch.linalg.solve(A @ A.T, (S * g @ A.T).T).T,
    )


def test_gradient_descent_is_lines_7_to_9_at_the_old_pair():
    model, pair = single()
    optimizer = LoraOne(model, lr=ETA, mode="gd", weight_decay=DECAY, dampening=EXACT)
    found = steps(optimizer, pair, 3)
    for t in range(3):
        (A, B), g = found[t], gradient(t)
        dA, dB = preconditioned(A, B, g)
        close(found[t + 1], ((1 - ETA * DECAY) * A - ETA * dA, (1 - ETA * DECAY) * B - ETA * dB))


def test_gradient_descent_moves_the_product_along_the_projected_gradient():
    model, pair = single()
    (A, B), (newA, newB) = steps(LoraOne(model, lr=1e-8, mode="gd", dampening=EXACT), pair, 1)
    PA = torch.linalg.pinv(A) @ A
    PB = B @ torch.linalg.pinv(B)
    g = gradient(0)
    way = (newB @ newA - B @ A) / (-1e-8 * S)
    torch.testing.assert_close(way, PB @ g + g @ PA, rtol=1e-5, atol=1e-6)


def test_adamw_takes_its_moments_from_preconditioned_gradients():
    model, pair = single()
    optimizer = LoraOne(model, lr=ETA, mode="adamw", weight_decay=DECAY, dampening=EXACT)
    found = steps(optimizer, pair, 4)
    copies = [torch.nn.Parameter(f.clone()) for f in found[0]]
    adamw = torch.optim.AdamW(copies, lr=ETA, weight_decay=DECAY)
    for t in range(4):
        for copy, d in zip(copies, preconditioned(*found[t], gradient(t)), strict=True):
            copy.grad = d
        adamw.step()
        close(found[t + 1], (copies[0].detach(), copies[1].detach()))


def test_another_mode_is_refused():
    with pytest.raises(ConfigError, match=r"mode must be one of \['adamw', 'gd'\], got 'sgd'"):
        LoraOne(toy(), lr=0.1, mode="sgd")
