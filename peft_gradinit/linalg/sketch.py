r"""Two-sided streaming sketch of a sum of outer products, and its reconstruction.

A matrix `G = sum_t y_t x_t^T` that is too large to hold is replaced by `Y = G Omega` and
`Z = G^T Psi`, which are sums over `t` as well. `reconstruct` turns `(Y, Z)` into the leading
singular triplets of `G`. Three choices make one pass accurate enough:

1. **Oriented test matrices.** Most columns of `Omega` (`Psi`) are right (left) singular vectors of
   the part of the stream seen so far, as a power iteration would choose them; the rest stay
   Gaussian and see what that part did not (`orient_test_matrices`).
2. **No second look at the data.** When the test matrices change, the part already summed is moved
   to the new ones through its own reconstruction. The columns that stay Gaussian are kept exactly;
   in the oriented ones `G_seen V = U S` holds by the definition of the singular vectors, and what
   the reconstruction lost lies outside the leading subspaces.
3. **Both sketches determine the core.** With `Q`, `P` orthonormal bases of the leading halves of
   `range(Y)`, `range(Z)`, the core `C ~ Q^T G P` is the least-squares solution of
   `C (P^T Omega) = Q^T Y` and `(Psi^T Q) C = Z^T P` together, a Sylvester equation with symmetric
   coefficients. Taking only half of the columns keeps both systems well conditioned when `Y` and
   `Z` have the same width, where the one-sided reconstruction needs `Z` twice as wide.

Sources: Tropp, Yurtsever, Udell & Cevher (2017), https://arxiv.org/abs/1609.00048 (one pass, two
sketches) and (2019), https://arxiv.org/abs/1902.08651; the joint core estimate is their
least-squares argument applied to both sides. Measurements: `scripts/bench_sketch.py`.
"""

from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from .gram import completed, left_and_right
from .precision import double, eigh, exact_products
from .svd import TruncatedSVD, check_rank
from .threads import one_thread


class TestMatrices(NamedTuple):
    """The test matrices of a stream: `Omega` multiplies inputs, `Psi` output gradients."""

    __test__ = False  # not a test class, whatever pytest makes of the name

    Omega: Float[Tensor, "in width"]
    Psi: Float[Tensor, "out width"]


def draw_test_matrix(
    dimension: int, width: int, *, seed: int, device: torch.device | str = "cpu"
) -> Float[Tensor, "dimension width"]:
    """Draw a Gaussian test matrix with entries of variance `1 / dimension`.

    Drawn on the CPU from the seed and the dimension alone, so every device and every process gets
    the same matrix without talking to others. The global generator is not touched.
    """
    generator = torch.Generator().manual_seed((seed * 1_000_003 + dimension) % 2**63)
    drawn = torch.randn(dimension, width, generator=generator, dtype=torch.float32, device="cpu")
    return (drawn / dimension**0.5).to(device)


def orient_test_matrices(
    U: Float[Tensor, "out n"], V: Float[Tensor, "in n"], random: TestMatrices
) -> TestMatrices:
    """Replace the first columns of `random` by singular vectors of what was seen so far."""
    n = U.shape[1]
    return TestMatrices(
        torch.cat([V, random.Omega[:, n:]], dim=1), torch.cat([U, random.Psi[:, n:]], dim=1)
    )


def reconstruct(
    Y: Float[Tensor, "*batch out width"],
    Z: Float[Tensor, "*batch in width"],
    test: TestMatrices,
    rank: int,
    core: int | None = None,
) -> TruncatedSVD:
    """Estimate the leading triplets of `G` from `Y = G Omega` and `Z = G^T Psi`.

    All arguments may have leading dimensions: the sketches of several matrices of one shape.

    Tall matrices are only multiplied. What is factored is `(width, width)` or smaller, is symmetric
    and is in float64, where a Gram matrix keeps the digits that float32 sketches have. Accelerators
    factor a stack of such matrices at once, which they do not do for singular values.

    Args:
        Y: `(*, out, width)` sketch of the columns.
        Z: `(*, in, width)` sketch of the rows.
        test: the test matrices that made them, with the same leading dimensions.
        rank: triplets to return, `rank <= core`.
        core: dimension of the two bases. Default: the larger of `rank` and half the width, at
            which both least-squares systems have twice as many equations as unknowns.

    Returns:
        Triplets with canonical signs; finite for zero and for rank-deficient sketches.

    Raises:
        ShapeError: if the sketches cannot carry `rank` triplets.
    """
    core = core or max(rank, Y.shape[-1] // 2)
    check_rank(rank, (Y.shape[-2], Z.shape[-2], min(core, Y.shape[-1])))
    scale = Y.abs().amax((-2, -1), keepdim=True).clamp_min(torch.finfo(Y.dtype).tiny)
    Y, Z = Y / scale, Z / scale
    with one_thread(), exact_products(Y.device):
        Q, P = _leading_basis(Y, core), _leading_basis(Z, core)
        U, S, V = left_and_right(_core(Q, P, Y, Z, test), rank)
        svd = completed(Q @ U.to(Q), S.to(Q), P @ V.to(P))
    return svd._replace(S=svd.S * scale[..., 0])


def _leading_basis(sketch: Tensor, dimension: int) -> Tensor:
    """Left singular vectors; zeros in place of those whose singular value is zero."""
    return left_and_right(double(sketch), dimension)[0].to(sketch)


def _core(Q: Tensor, P: Tensor, Y: Tensor, Z: Tensor, test: TestMatrices) -> Tensor:
    """Minimise `|C (P^T Omega) - Q^T Y|^2 + |(Psi^T Q) C - Z^T P|^2` over `C`, in float64.

    The normal equations read `C a + b C = d` with symmetric `a = (P^T Omega)(P^T Omega)^T` and
    `b = (Psi^T Q)^T (Psi^T Q)`: diagonalise both and divide.
    """
    right, left = double(P.mT @ test.Omega), double(test.Psi.mT @ Q)
    d = double(Q.mT @ Y) @ right.mT + left.mT @ double(Z.mT @ P)
    a_values, a_vectors = eigh(right @ right.mT)
    b_values, b_vectors = eigh(left.mT @ left)
    divisor = b_values[..., :, None] + a_values[..., None, :]
    divisor = divisor.clamp_min(torch.finfo(torch.float32).eps)
    return b_vectors @ (b_vectors.mT @ d @ a_vectors / divisor) @ a_vectors.mT
