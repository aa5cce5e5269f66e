"""Updates of a weight that are known as a product of two thin factors."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .svd import TruncatedSVD, svd_of_product


class Factors(NamedTuple):
    """An update `B A` of an `(out, in)` weight, its scaling inside `B`.

    Attributes:
        A: `(r, in)`.
        B: `(out, r)`.
    """

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "out r"]

    @property
    def r(self) -> int:
        """Inner dimension."""
        return self.A.shape[0]

    def svd(self) -> TruncatedSVD:
        """Triplets of the product, which is never formed; in float64, returned in float32."""
        rank = min(self.r, self.A.shape[1], self.B.shape[0])
        svd = svd_of_product(self.B.double(), self.A.double().T, rank)
        return TruncatedSVD(*(part.float() for part in svd))

    def matrix(self) -> Float[Tensor, "out in"]:
        """The update itself."""
        return self.B @ self.A


def joined(*updates: Factors) -> Factors:
    """The sum of updates as one, of the sum of their ranks; exact."""
    return Factors(
        torch.cat([u.A for u in updates], dim=0), torch.cat([u.B for u in updates], dim=1)
    )


def negated(update: Factors) -> Factors:
    """The update with the other sign."""
    return Factors(update.A, -update.B)


def inner_product(one: Factors, other: Factors) -> float:
    """Frobenius inner product of two updates from small Gram matrices."""
    gram = (one.B.double().T @ other.B.double()) * (one.A.double() @ other.A.double().T)
    return gram.sum().item()


def truncated(update: Factors, rank: int) -> tuple[Factors, float]:
    """The best approximation of lower rank, singular values shared evenly by the factors.

    Args:
        update: any.
        rank: of the result; one at least that of `update` costs nothing.

    Returns:
        The approximation, and its Frobenius error relative to the update; 0 for a zero update.
    """
    svd = update.svd()
    kept, root = svd.truncate(rank), svd.S[:rank].sqrt()
    lost = svd.S[rank:].double().square().sum().sqrt().item()
    whole = svd.S.double().square().sum().sqrt().item()
    factors = Factors((kept.Vh.T * root).T.contiguous(), kept.U * root)
    return factors, lost / whole if whole else 0.0
