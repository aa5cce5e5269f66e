"""What the optimisers' formulas share: powers of Gram matrices and Adam's direction.

Everything is batched over a leading dimension, and finite for factors that are zero, of lower rank
than they have columns, or so large or small that their Gram matrix is not a float32 number.
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

Square = Float[Tensor, "n r r"]
Tall = Float[Tensor, "n rows r"]

_ROUNDING = 8
"""Eigenvalues below `max(_ROUNDING, r) * eps` of the norm are rounding errors of the others."""


def gram_power(tall: Tall, exponent: float, dampening: float = 0.0) -> Square:
    """`(X^T X + dampening |X^T X| I)^exponent`, zero for `X = 0`.

    With -1/2 and no dampening, `X gram_power(X)` is the matrix sign `U V^T` of `X = U S V^T`, without the
    directions that `X` does not have.

    Args:
        tall: `X`; a factor `A` is passed as `A^T`.
        exponent: -1/2 or -1.
        dampening: fraction of the Frobenius norm, which is the largest eigenvalue or a little more,
            that is added to all eigenvalues; at least what the dtype cannot tell from rounding.

    Returns:
        The symmetric power.
    """
    # So that the power is finite: below this, a matrix is zero.
    smallest = torch.finfo(tall.dtype).tiny ** (0.4 / abs(exponent))
    entries = (-2, -1)  # the largest in size, without a copy of all
    scale = torch.maximum(tall.amax(entries, keepdim=True), -tall.amin(entries, keepdim=True))
    bounded = scale.clamp_min(smallest)
    unit = tall / bounded
    scaled = power(unit.mT @ unit, exponent, dampening) * bounded ** (2 * exponent)
    return scaled.where(scale > smallest, torch.zeros_like(scaled))


def power(matrix: Square, exponent: float, dampening: float = 0.0) -> Square:
    """The same of a symmetric matrix without negative eigenvalues; zero for zero.

    By decomposition on the CPU. On accelerators by Newton-Schulz iteration, which is products alone:
    CUDA decomposes the matrices of a batch one after the other if they are wider than 32.

    Entries that are not finite count as zero, so that a decomposition never fails; they come back
    with the gradient that the power is multiplied with.
    """
    matrix = torch.nan_to_num(matrix, 0.0, 0.0, 0.0)
    norm = torch.linalg.matrix_norm(matrix, keepdim=True)
    floor = max(dampening, max(_ROUNDING, matrix.shape[-1]) * torch.finfo(matrix.dtype).eps)
    unit = matrix / norm.clamp_min(torch.finfo(matrix.dtype).tiny)
    if decomposes(matrix):
        values, vectors = torch.linalg.eigh(unit)
        powers = (values.clamp_min(0) + floor) ** exponent
        found = (vectors * powers[..., None, :]) @ vectors.mT
    else:
        root = newton_schulz(unit, floor)
        found = root if exponent == -0.5 else root @ root
    scaled = found * norm.clamp_min(torch.finfo(matrix.dtype).tiny) ** exponent
    return scaled.where(norm > 0, torch.zeros_like(scaled))


def newton_schulz(unit: Square, floor: float) -> Square:
    """`(X + floor I)^(-1/2)` of a symmetric `X` with eigenvalues from 0 to 1, by products alone.

    The root of the smallest eigenvalue grows by 3/2 in a step until it is near 1, and then converges
    quadratically; the number of steps follows from the floor.

    Source:
        The coupled iteration of Higham (2008), Functions of Matrices, Eq. 6.35.
    """
    identity = torch.eye(unit.shape[-1], dtype=unit.dtype, device=unit.device).expand_as(unit)
    Y, Z = (unit + floor * identity) / (1 + floor), identity
    for _ in range(math.ceil(-0.5 * math.log(floor) / math.log(1.5)) + 6):
        T = torch.baddbmm(identity, Z, Y, beta=1.5, alpha=-0.5)
        Y, Z = Y @ T, T @ Z
    return Z / math.sqrt(1 + floor)


def decomposes(matrix: Tensor) -> bool:
    """Whether decompositions are the faster way where the matrix is."""
    return matrix.device.type == "cpu"


def adam_direction(
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    step: int | Tensor,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Update Adam's two moments in place, and give `m / (sqrt(v) + eps)` without their bias.

    Args:
        gradient: of any shape.
        moments: `m` and `v` of that shape.
        step: 1 for the first; or the numbers of the steps, `(n, 1, 1)`.
        betas: decay of `m` and of `v`.
        eps: added to the root.

    Returns:
        The direction; a step goes against it.

    Source:
        Kingma & Ba (2015), Algorithm 1.
    """
    first, second = moments
    first.lerp_(gradient, 1 - betas[0])
    second.mul_(betas[1]).addcmul_(gradient, gradient, value=1 - betas[1])
    root = (second / filled(betas[1], step)).sqrt_().add_(eps)
    return first / filled(betas[0], step) / root


def filled(beta: float, step: int | Tensor) -> float | Tensor:
    """`1 - beta^step`: how much of a moving average from zero is data after that many."""
    if isinstance(step, int):
        return 1 - beta**step
    smallest = torch.finfo(step.dtype).tiny
    return -torch.expm1(step * math.log(max(beta, smallest)))
