"""The gradient of a linear layer's weight, as a weighted sum over tokens.

For `y = W x` the gradient is `G = sum_t dy_t x_t^T`, `(out, in)`. Both estimators accumulate
`sum_b w_b G_b` in float32 and `sum_b w_b` over batches `b`, and divide once at the end, so that the
answer does not depend on how the samples were batched.
"""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from ..linalg import TruncatedSVD, double, gram_svd, of_stack
from .base import Statistic
from .products import add_product, product_dtype


class GradientStatistic(Statistic):
    """Accumulates `sum_b w_b G_b` of one layer; `weight` is `sum_b w_b`, in tokens with loss."""

    def __init__(self, out_features: int, in_features: int) -> None:
        super().__init__()
        self.shape = (out_features, in_features)

    @torch.no_grad()
    def add(
        self,
        x: Float[Tensor, "*batch in"],
        dy: Float[Tensor, "*batch out"],
        weight: float | int = 1.0,
    ) -> None:
        """Add `weight * dy^T x`; all leading dimensions are tokens.

        Args:
            x: layer inputs, any floating dtype.
            dy: gradients with respect to the layer's outputs.
            weight: factor of this contribution (the batch's tokens over the loss scale).
        """
        self.move(x.device)
        dtype = product_dtype(x, dy)
        x = x.reshape(-1, x.shape[-1]).to(dtype)
        dy = dy.reshape(-1, dy.shape[-1]).to(dtype)
        self._accumulate(x, dy, weight)
        self.n_calls += 1

    def count(self, weight: float | int) -> None:
        """Add the weight of one batch to the denominator, once per batch and not per call."""
        self.weight += weight

    @abstractmethod
    def triplets(self, rank: int) -> TruncatedSVD:
        """Estimate the leading triplets of the mean gradient, `(sum w G) / (sum w)`."""

    def triplets_alike(self, group: Sequence[Any], rank: int) -> list[TruncatedSVD]:
        """Triplets of statistics of one kind: this one is among them."""
        return [statistic.triplets(rank) for statistic in group]

    @abstractmethod
    def energy(self, triplets: TruncatedSVD | None = None) -> float:
        """Squared Frobenius norm of the mean gradient; `triplets` improve a sketch's estimate."""

    @abstractmethod
    def _accumulate(self, x: Tensor, dy: Tensor, weight: float | int) -> None: ...

    def describe(self) -> str:  # noqa: D102
        return f"{type(self).__name__}{self.shape}"


class DenseGradient(GradientStatistic):
    """Holds the `(out, in)` gradient itself, float32: exact.

    For small models, for layers so narrow that a sketch would be larger, and as the oracle of the
    tests. Memory: `4 * out * in` bytes.
    """

    def sum_shapes(self) -> Mapping[str, tuple[int, ...]]:  # noqa: D102
        return {"sum": self.shape}

    def _accumulate(self, x: Tensor, dy: Tensor, weight: float | int) -> None:
        (total,) = self.sums(x.device)
        add_product(total, dy.T, x, weight)

    def mean(self) -> Float[Tensor, "out in"]:
        """The mean gradient; zeros if nothing was added."""
        return (
            self._mean("sum")
            if self.has_sums
            else torch.zeros(self.shape, dtype=torch.float32, device="cpu")
        )

    def triplets(self, rank: int) -> TruncatedSVD:  # noqa: D102
        return self.triplets_alike([self], rank)[0]

    def triplets_alike(self, group: Sequence[Any], rank: int) -> list[TruncatedSVD]:  # noqa: D102
        return of_stack(lambda mean: gram_svd(mean, rank), [[one.mean()] for one in group])

    def energy(self, triplets: TruncatedSVD | None = None) -> float:  # noqa: D102
        return double(self.mean()).square().sum().item()
