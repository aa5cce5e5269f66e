"""LoRA-RITE: the paper's step in its own QR bases, and departures from the authors' code."""

import torch

from peft_gradinit.optim import LoraRite
from tests.optim.rows import EXACT
from tests.optim.single import IN, OUT, R, S, close, gradient, single, steps

ETA, BETAS, DECAY = 0.02, (0.9, 0.99), 0.3


def inverse_root(V):
    values, vectors = torch.linalg.eigh(V)
    return vectors @ torch.diag(values**-0.5) @ vectors.T


class Side:
    """One factor of the paper's algorithm, as a tall matrix, with the old basis as state."""

    def __init__(self, rows):
        self.M, self.V = torch.zeros(rows, R).double(), torch.zeros(R, R).double()
        self.old = None

    def step(self, gradient, other, t):
        Q, upper = torch.linalg.qr(other)
        inverse = torch.linalg.inv(upper)
        P = Q.T @ (Q if self.old is None else self.old)
        g = gradient @ inverse
        b1, b2 = (b * (1 - b ** (t - 1)) / (1 - b**t) for b in BETAS)
        self.V = b2 * P @ self.V @ P.T + (1 - b2) * g.T @ g / len(g)
        self.M = b1 * self.M @ P.T + (1 - b1) * g @ inverse_root(self.V)
        self.old = Q
        return self.M @ inverse.T


def test_steps_are_the_papers():
    model, pair = single()
    A, B = pair.A.detach().clone(), pair.B.detach().clone()
    of_A, of_B = Side(IN), Side(OUT)
    optimizer = LoraRite(model, lr=ETA, betas=BETAS, weight_decay=DECAY, dampening=EXACT)
    for t, got in enumerate(steps(optimizer, pair, 5)[1:], start=1):
        g = gradient(t - 1)
        dA = of_A.step((S * B.T @ g).T, B, t).T
        dB = of_B.step(S * g @ A.T, A.T, t)
        A = A - ETA * (dA / S + DECAY * A)
        B = B - ETA * (dB / S + DECAY * B)
        close(got, (A, B), 1e-7)


def test_the_first_step_does_not_depend_on_the_gradients_size_and_none_is_dropped():
    ways = []
    for scale in (1e-3, 1.0, 1e6):
        model, pair = single()
        optimizer = LoraRite(model, lr=ETA)
        A, B = pair.A.detach().clone(), pair.B.detach().clone()
        g = scale * gradient(0)
        pair.A.grad, pair.B.grad = S * B.T @ g, S * g @ A.T
        optimizer.step()
        ways.append((pair.A - A, pair.B - B))
    assert ways[0][0].norm() > 0
    close(ways[0], ways[1])
    close(ways[2], ways[1])


def test_moments_are_carried_over_when_the_basis_turns():
    """A factor that is turned by the step itself: the kept second moment is that of the new basis."""
    model, pair = single()
    optimizer = LoraRite(model, lr=5.0, dampening=EXACT)
    (A, B), (newA, newB) = steps(optimizer, pair, 1)
    P = inverse_root(newA @ newA.T) @ newA @ A.T @ inverse_root(A @ A.T)
    g = S * gradient(0) @ A.T @ inverse_root(A @ A.T)
    want = P @ (g.T @ g / OUT) @ P.T
    torch.testing.assert_close(optimizer.state[pair.B]["second_moment"][0], want)
    assert (P.T @ P - torch.eye(R)).norm() > 0.01  # it has turned out of its span
    assert newB.shape == B.shape
