"""LoRA-Pro: the closest step to the gradient, Adam in both modes, and the equation for `X`."""

import torch

from peft_gradinit import pairs
from peft_gradinit.optim import LoraPro
from peft_gradinit.optim.lora_pro import adjusted, equivalent, sylvester
from peft_gradinit.optim.stacks import Stack
from tests.optim.rows import EXACT, factors, run, toy
from tests.optim.single import S, close, gradient, single, steps

ETA, DECAY = 0.02, 0.3


def stack_of(A, B, g, moves=(True, True)):
    parts = (A, B, S * B.T @ g, S * g @ A.T)
    return Stack(*(p[None] for p in parts), S, 1, moves)


def closest(A, B, g):
    """`a` and `b` by least squares: the least norm change of all closest steps, by a direct solver."""
    out, size = g.shape
    r = A.shape[0]
    columns = []
    for i in range(r * size + out * r):
        unit = torch.zeros(r * size + out * r).double()
        unit[i] = 1
        a, b = unit[: r * size].view(r, size), unit[r * size :].view(out, r)
        columns.append((S * B @ a + S * b @ A).flatten())
    matrix = torch.stack(columns, 1)
    # Of all closest steps, that closest to the gradients: solve for the difference to them.
    plain = torch.cat([(S * B.T @ g).flatten(), (S * g @ A.T).flatten()])
    rest = torch.linalg.pinv(matrix, rtol=1e-9) @ (g.flatten() - matrix @ plain)
    best = plain + rest
    return best[: r * size].view(r, size), best[r * size :].view(out, r)


def test_the_step_is_the_closest_to_the_gradient_and_of_these_to_the_factors_gradients():
    _, pair = single()
    A, B, g = pair.A.detach(), pair.B.detach(), gradient(0)
    a, b = adjusted(stack_of(A, B, g), EXACT)
    close((a[0], b[0]), closest(A, B, g), 1e-6)
    I_A = torch.eye(A.shape[1]) - torch.linalg.pinv(A) @ A
    I_B = torch.eye(B.shape[0]) - B @ torch.linalg.pinv(B)
    want = g - I_B @ g @ I_A
    torch.testing.assert_close(equivalent(stack_of(A, B, g), (a, b))[0], want)


def test_of_one_trainable_factor_it_is_the_best_step_of_that_one():
    _, pair = single()
    A, B, g = pair.A.detach(), pair.B.detach(), gradient(0)
    stack = stack_of(A, B, g, (False, True))._replace(gA=torch.zeros(1, *A.shape).double())
    _, b = adjusted(stack, EXACT)
    best = torch.linalg.lstsq(S * A.T, g.T).solution.T
    torch.testing.assert_close(b[0], best)


def adam(found, make, n):
    """Adam's direction of each of some tensors, by `torch.optim.Adam`."""
    copies = [torch.nn.Parameter(torch.zeros_like(t)) for t in make(0)]
    optimizer = torch.optim.Adam(copies, lr=1.0)
    for t in range(n):
        before = [c.detach().clone() for c in copies]
        for copy, value in zip(copies, make(t), strict=True):
            copy.grad = value
        optimizer.step()
        yield found[t], [b - c.detach() for b, c in zip(before, copies, strict=True)]


def test_full_mode_has_adams_moments_of_the_equivalent_gradient():
    model, pair = single()
    optimizer = LoraPro(model, lr=ETA, weight_decay=DECAY, dampening=EXACT)
    found = steps(optimizer, pair, 4)

    def make(t):
        A, B = found[t]
        a, b = closest(A, B, gradient(t))
        return [S * B @ a + S * b @ A]

    for t, ((A, B), (u,)) in enumerate(adam(found, make, 4)):
        a, b = closest(A, B, u)
        shrink = 1 - ETA * DECAY
        close(found[t + 1], (shrink * A - ETA * a, shrink * B - ETA * b), 1e-6)


def test_efficient_mode_has_adams_moments_of_the_adjusted_gradients():
    model, pair = single()
    optimizer = LoraPro(model, lr=ETA, mode="efficient", weight_decay=DECAY, dampening=EXACT)
    found = steps(optimizer, pair, 4)
    for t, ((A, B), (a, b)) in enumerate(adam(found, lambda t: closest(*found[t], gradient(t)), 4)):
        shrink = 1 - ETA * DECAY
        close(found[t + 1], (shrink * A - ETA * a, shrink * B - ETA * b), 1e-5)


def test_sylvesters_equation_is_solved():
    X = torch.randn(2, 5, 4).double()
    left, right = X.mT @ X, torch.randn(2, 4, 4).double()
    right = right @ right.mT
    target = torch.randn(2, 4, 4).double()
    solved = sylvester(left, right, target)
    torch.testing.assert_close(left @ solved + solved @ right, target)
    assert not sylvester(0 * left, 0 * right, target).any()


def test_the_scaling_is_the_layers_own():
    """With rsLoRA, as with any: the step of the product for a first gradient does not depend on it."""
    ways = []
    for options in ({"lora_alpha": 6}, {"lora_alpha": 12, "use_rslora": True}):
        model = toy(dtype=torch.float64, **options)
        for pair in pairs(model):
            pair.B.data /= pair.scaling
        before = [p.scaling * p.B.detach() @ p.A.detach() for p in pairs(model)]
        run(model, LoraPro(model, lr=1e-8, dampening=EXACT), 1)
        after = [p.scaling * p.B.detach() @ p.A.detach() for p in pairs(model)]
        ways.append([b - a for a, b in zip(before, after, strict=True)])
        assert all(f.isfinite().all() for f in factors(model))
    for one, other in zip(*ways, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-12)
