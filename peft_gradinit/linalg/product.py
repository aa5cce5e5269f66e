"""Low-rank products `B A`, handled through their factors: the product itself is never formed."""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ShapeError
from .precision import double
from .svd import svd_of_product
from .threads import one_thread


class TruncatedProduct(NamedTuple):
    """The best approximation `B' A'` of `B A` of a lower rank, in the dtypes of the factors.

    `relative_error` is `|B A - B' A'|_F / |B A|_F`; 0 for a product that is zero.
    """

    B: Float[Tensor, "out rank"]
    A: Float[Tensor, "rank in"]
    relative_error: float


def truncate_product(
    B: Float[Tensor, "out inner"], A: Float[Tensor, "inner in"], rank: int
) -> TruncatedProduct:
    """Lower the rank of `B A` with the least error in the Frobenius norm (Eckart and Young).

    Both factors are reduced by QR and the `(inner, inner)` core is decomposed, in float64. In
    float32, a small difference of two large products (`B A - B0 A0`) would lose its digits. The new
    factors share the singular values evenly. If `rank >= inner`, the factors are returned as they
    are.

    Raises:
        ShapeError: if the rank is not positive or the factors do not fit together.
    """
    inner = A.shape[0]
    if B.shape[1] != inner:
        raise ShapeError(
            f"factors of shapes {tuple(B.shape)} and {tuple(A.shape)} have no product; pass B "
            "(out, r) and A (r, in)."
        )
    if rank < 1:
        raise ShapeError(f"a product cannot have rank={rank}; pass at least 1.")
    if rank >= inner:
        return TruncatedProduct(B, A, 0.0)
    with one_thread():
        left, right = B.detach().cpu().double(), A.detach().cpu().double()
        svd = svd_of_product(left, right.T, min(inner, B.shape[0], A.shape[1]))
    kept, roots = svd.truncate(rank), svd.S[:rank].sqrt()
    total = svd.S.norm().item()
    error = svd.S[rank:].norm().item() / total if total else 0.0
    return TruncatedProduct((kept.U * roots).to(B), (roots[:, None] * kept.Vh).to(A), error)


def pad_rank(
    B: Float[Tensor, "out inner"], A: Float[Tensor, "inner in"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "rank in"]]:
    """Append zeros to the factors up to a larger `rank`; their product stays as it is."""
    missing = rank - A.shape[0]
    if missing < 0:
        raise ShapeError(
            f"factors of rank {A.shape[0]} cannot be padded to rank={rank}; truncate them."
        )
    columns, rows = B.new_zeros(B.shape[0], missing), A.new_zeros(missing, A.shape[1])
    return torch.cat([B, columns], dim=1), torch.cat([A, rows])


def frobenius_of_product(B: Tensor, A: Tensor) -> float:
    """`|B A|_F` from the two `r x r` Gram matrices."""
    left, right = double(B), double(A)
    gram = (left.T @ left) * (right @ right.T)
    return torch.sqrt(gram.sum().clamp_min(0)).item()
