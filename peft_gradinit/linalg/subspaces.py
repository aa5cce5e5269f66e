"""Angles between subspaces, the effective rank of a spectrum, and intruder dimensions."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..errors import ShapeError
from .precision import double
from .svd import TruncatedSVD


def principal_angles(
    first: Float[Tensor, "dimension m"], second: Float[Tensor, "dimension n"]
) -> Float[Tensor, " k"]:
    """Compute the `min(m, n)` principal angles between the spans of orthonormal columns, ascending.

    In radians and float64. Small angles are taken from their sines, large ones from their cosines,
    so that both keep their digits. Source: Bjorck & Golub (1973), "Numerical methods for computing
    angles between linear subspaces".

    Raises:
        ShapeError: if the columns are not of one dimension.
    """
    if first.shape[0] != second.shape[0]:
        raise ShapeError(
            f"subspaces of dimensions {first.shape[0]} and {second.shape[0]} have no angles to each "
            "other; compare layers of one shape."
        )
    small, large = sorted((double(first), double(second)), key=lambda basis: basis.shape[1])
    product = large.T @ small
    cosines = torch.linalg.svdvals(product).clamp(0, 1)
    sines = torch.linalg.svdvals(small - large @ product).clamp(0, 1).flip(0)
    return torch.where(cosines.square() > 0.5, sines.asin(), cosines.acos())


def effective_rank(singular_values: Float[Tensor, " n"]) -> float:
    """Compute the exponential of the entropy of the normalised singular values.

    Between 1 (one value carries all) and `n` (all equal); 0 if all are zero. Source: Roy & Vetterli
    (2007), "The effective rank: a measure of effective dimensionality".
    """
    values = double(singular_values)
    total = values.sum()
    if not total > 0:
        return 0.0
    shares = values / total
    return torch.special.entr(shares).sum().exp().item()


def intruder_dimensions(
    tuned: TruncatedSVD, base_U: Float[Tensor, "out n"], threshold: float = 0.5
) -> Int[Tensor, " k"]:
    """Find the singular vectors of a tuned weight that no singular vector of its base resembles.

    Args:
        tuned: the leading triplets of `W + dW`, as many as are to be looked at.
        base_U: all left singular vectors of `W`.
        threshold: a left vector is an intruder if its largest absolute cosine with a vector of the
            base is below. 0.5, as in the paper.

    Returns:
        Indices into `tuned`, ascending.

    Source:
        Shuttleworth, Andreas, Torralba & Sharma (2024), https://arxiv.org/abs/2410.21228.
    """
    largest = (tuned.U.T @ base_U.to(tuned.U)).abs().amax(dim=1)
    return (largest < threshold).nonzero()[:, 0]
