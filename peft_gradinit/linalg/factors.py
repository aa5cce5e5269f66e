"""Low-rank updates of a weight, each known as the product of two thin factors."""

import math
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .precision import double
from .product import pad_rank, truncate_product
from .svd import TruncatedSVD, svd_of_product

_ROUNDING = 1e-9
"""Products below this share of their factors' norms are rounding errors of a start that is zero."""


class Factors(NamedTuple):
    """An update `B A` of an `(out, in)` weight; the scaling is inside `B`."""

    A: Float[Tensor, "r in"]
    B: Float[Tensor, "out r"]

    @property
    def r(self) -> int:
        """Inner dimension."""
        return self.A.shape[0]

    def svd(self) -> TruncatedSVD:
        """Triplets of the product, which is never formed; in float64, returned in float32."""
        rank = min(self.r, self.A.shape[1], self.B.shape[0])
        svd = svd_of_product(double(self.B), double(self.A).T, rank)
        return TruncatedSVD(*(part.float().to(self.A.device) for part in svd))

    def truncated(self, rank: int) -> "tuple[Factors, float]":
        """The best approximation of lower rank, and its error; see `truncate_product`."""
        B, A, error = truncate_product(self.B, self.A, rank)
        return Factors(A, B), error

    def padded(self, rank: int) -> "Factors":
        """The same update in factors of a larger rank, filled with zeros."""
        B, A = pad_rank(self.B, self.A, rank)
        return Factors(A, B)

    def matrix(self) -> Float[Tensor, "out in"]:
        """The update itself."""
        return self.B @ self.A


def joined(*updates: Factors) -> Factors:
    """The sum of updates as one update, exact; its rank is the sum of their ranks."""
    return Factors(
        torch.cat([u.A for u in updates], dim=0), torch.cat([u.B for u in updates], dim=1)
    )


def negated(update: Factors) -> Factors:
    """The update with the other sign."""
    return Factors(update.A, -update.B)


def rounding_of(update: Factors) -> float:
    """The Frobenius norm that rounding alone may leave of an update that is zero, from float32 factors."""
    sizes = (torch.linalg.vector_norm(factor.float()).item() for factor in (update.A, update.B))
    return _ROUNDING * math.prod(sizes)


def inner_product(one: Factors, other: Factors) -> float:
    """Frobenius inner product of two updates, from small Gram matrices."""
    gram = (double(one.B).T @ double(other.B)) * (double(one.A) @ double(other.A).T)
    return gram.sum().item()
