r"""Principal components of a positive semi-definite matrix that is known through `Y = C Omega`.

The Nystrom approximation `Y (Omega^T Y)^+ Y^T` is the largest matrix below `C` in the semi-definite
order that agrees with `C` on the columns of `Omega`. It needs one product with `C` where a
randomised range finder needs two, so that one pass over the data is enough.

Source: Tropp, Yurtsever, Udell & Cevher (2017), "Fixed-rank approximation of a positive-semidefinite
matrix from streaming data", Algorithm 3, https://arxiv.org/abs/1706.05736.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ShapeError
from .precision import eigh, exact_products, qr, svd
from .svd import TruncatedSVD, fix_signs


class Components(NamedTuple):
    """Leading eigenpairs of an `(in, in)` second moment, largest first.

    Rows of `Vh` are orthonormal; in each, the entry largest in magnitude is positive.
    """

    Vh: Float[Tensor, "rank in"]
    variance: Float[Tensor, " rank"]


def nystrom(
    Y: Float[Tensor, "in width"], Omega: Float[Tensor, "in width"], rank: int
) -> Components:
    """Estimate the leading eigenpairs of `C >= 0` from `Y = C Omega`.

    `Omega` (of full column rank) is orthonormalised. A shift of the size of the rounding error is
    added to `C` and taken off the eigenvalues, as in the source. The core `Omega^T Y` is inverted
    through its eigenvalues, not by a Cholesky factor: where sums were carried over from other test
    matrices, it is positive only up to the error of the carrying.

    The result is finite for zero and for rank-deficient sketches; eigenvectors of zero are some
    orthonormal completion. Cost: three factorisations of an `(in, width)` matrix, `O(in width^2)`.

    Raises:
        ShapeError: unless `1 <= rank <= width <= in`.
    """
    dimension, width = Y.shape
    if not 1 <= rank <= width <= dimension:
        raise ShapeError(
            f"a Nystrom sketch of {width} columns of a {dimension} x {dimension} matrix cannot give "
            f"{rank} components; 1 <= rank <= width <= dimension must hold: widen the sketch, or "
            "take the matrix itself."
        )
    scale = Y.abs().amax().clamp_min(torch.finfo(Y.dtype).tiny)
    with exact_products(Y.device):
        Q, R = qr(Omega)
        Y = torch.linalg.solve_triangular(R, Y / scale, upper=True, left=False)
        shift = dimension**0.5 * torch.finfo(Y.dtype).eps * torch.linalg.vector_norm(Y)
        shift = shift.clamp_min(torch.finfo(Y.dtype).tiny)
        Y = Y + shift * Q
        core = Q.T @ Y
        values, vectors = eigh((core + core.T) / 2)
        factor = Y @ (vectors * values.maximum(shift).rsqrt())
        V, S, _ = svd(factor)
        return _canonical(V[:, :rank], (S[:rank].square() - shift).clamp_min(0) * scale)


def eigenpairs(matrix: Float[Tensor, "in in"], rank: int) -> Components:
    """Compute the leading eigenpairs of a symmetric `C >= 0` exactly; negative values become 0."""
    if not 1 <= rank <= matrix.shape[0]:
        raise ShapeError(
            f"a {matrix.shape[0]} x {matrix.shape[0]} matrix has between 1 and {matrix.shape[0]} "
            f"components, but rank={rank} was asked for; lower the rank."
        )
    values, vectors = eigh((matrix + matrix.T) / 2)
    return _canonical(vectors.flip(1)[:, :rank], values.flip(0)[:rank].clamp_min(0))


def explained_share(rows: Float[Tensor, "rank in"], components: Components) -> float:
    """Divide the variance that `rows` explain by what the same number of components explains.

    Args:
        rows: orthonormal directions.
        components: leading components, at least as many as there are rows.

    Returns:
        1 if `rows` span the leading components or if there is no variance, less otherwise.
    """
    best = components.variance[: rows.shape[0]].sum()
    explained = (components.variance * (rows @ components.Vh.T).square().sum(0)).sum()
    return (explained / best).item() if best > 0 else 1.0


def _canonical(V: Tensor, variance: Tensor) -> Components:
    return Components(fix_signs(TruncatedSVD(V, variance, V.T)).Vh.contiguous(), variance)
