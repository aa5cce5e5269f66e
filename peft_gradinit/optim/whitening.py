"""What the optimisers' formulas share: powers of Gram matrices and Adam's direction.

Everything is batched over a leading dimension, and finite for factors that are zero, of lower rank
than they have columns, or so large or small that their Gram matrix is not a float32 number.
"""

import torch
from jaxtyping import Float
from torch import Tensor

Square = Float[Tensor, "n r r"]
Tall = Float[Tensor, "n rows r"]

_ROUNDING = 8
"""Eigenvalues below `_ROUNDING * eps` of the largest are rounding errors of the others."""


def gram_power(tall: Tall, exponent: float, dampening: float = 0.0) -> Square:
    """`(X^T X + dampening * lambda_1 I)^exponent` for a negative exponent; zero for `X = 0`.

    With -1/2 and no dampening, `X gram_power(X)` is the matrix sign `U V^T` of `X = U S V^T`, without the
    directions that `X` does not have.

    Args:
        tall: `X`; a factor `A` is passed as `A^T`.
        exponent: -1/2 or -1.
        dampening: fraction of the largest eigenvalue that is added to all; at least what the dtype
            cannot tell from rounding.

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

    Entries that are not finite count as zero, so that a decomposition never fails; they come back
    with the gradient that the power is multiplied with.
    """
    values, vectors = torch.linalg.eigh(torch.nan_to_num(matrix, 0.0, 0.0, 0.0))
    largest = values[..., -1:]
    floor = max(dampening, _ROUNDING * torch.finfo(matrix.dtype).eps)
    damped = values.clamp_min(0) + floor * largest
    powers = damped.clamp_min(torch.finfo(matrix.dtype).tiny) ** exponent
    powers = powers.where(largest > 0, torch.zeros_like(powers))
    return (vectors * powers[..., None, :]) @ vectors.mT


def adam_direction(
    gradient: Tensor,
    moments: tuple[Tensor, Tensor],
    step: int,
    betas: tuple[float, float],
    eps: float,
) -> Tensor:
    """Update Adam's two moments in place, and give `m / (sqrt(v) + eps)` without their bias.

    Args:
        gradient: of any shape.
        moments: `m` and `v` of that shape.
        step: 1 for the first.
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
    root = (second / (1 - betas[1] ** step)).sqrt_().add_(eps)
    return first / (1 - betas[0] ** step) / root
