"""The gradient of a linear layer's weight, as a weighted sum over tokens.

For `y = W x` the gradient is `G = sum_t dy_t x_t^T`, `(out, in)`. Both estimators accumulate
`sum_b w_b G_b` in float32 and `sum_b w_b` over batches `b`, and divide once at the end, so that the
answer does not depend on how the samples were batched. Two accumulators merge by adding.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ShapeError
from ..linalg import TruncatedSVD, truncated_svd


class GradientStatistic(ABC):
    """Accumulates `sum_b w_b G_b` of one layer.

    Attributes:
        shape: `(out, in)` of the layer's weight.
        weight: `sum_b w_b` so far, in the caller's unit (tokens that carry loss).
        n_calls: how often the layer handed over a gradient.
    """

    def __init__(self, out_features: int, in_features: int) -> None:
        self.shape = (out_features, in_features)
        self.weight = 0.0
        self.n_calls = 0

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
        x = x.reshape(-1, x.shape[-1]).float()
        dy = dy.reshape(-1, dy.shape[-1]).float()
        self._accumulate(x, dy, weight)
        self.n_calls += 1

    def count(self, weight: float | int) -> None:
        """Add the weight of one batch to the denominator, once per batch and not per call."""
        self.weight += weight

    def merge(self, other: "GradientStatistic") -> None:
        """Add another accumulator of the same layer and kind.

        Args:
            other: filled by another part of the data; not modified.

        Raises:
            ShapeError: if the two differ in kind, shape or test matrices.
        """
        if type(self) is not type(other) or self.shape != other.shape:
            raise ShapeError(
                f"cannot merge {type(other).__name__}{other.shape} into "
                f"{type(self).__name__}{self.shape}; merge accumulators of the same layer."
            )
        self._merge_sums(other)
        self.weight += other.weight
        self.n_calls += other.n_calls

    can_orient: ClassVar[bool] = False
    """Whether there is something to adapt to the data seen so far."""

    def orient(self) -> None:  # noqa: B027 optional for children
        """Adapt to the data seen so far; does nothing where nothing is to adapt."""

    def oriented(self) -> list[Tensor]:
        """What `orient` has made, which parts of the data that are summed later have to share."""
        return []

    @abstractmethod
    def triplets(self, rank: int) -> TruncatedSVD:
        """Estimate the leading triplets of the mean gradient, `(sum w G) / (sum w)`."""

    @abstractmethod
    def energy(self, triplets: TruncatedSVD | None = None) -> float:
        """Estimate the squared Frobenius norm of the mean gradient.

        Args:
            triplets: what `triplets(rank)` gave; makes the estimate of a sketch more accurate.
        """

    @abstractmethod
    def sums(self, device: torch.device) -> list[Tensor]:
        """The tensors that add up over parts of the data; zeros on `device` if nothing was added."""

    def clear(self) -> None:
        """Forget what was added, but not how it is measured."""
        for tensor in self._existing_sums():
            tensor.zero_()
        self.weight, self.n_calls = 0.0, 0

    @abstractmethod
    def _existing_sums(self) -> list[Tensor]: ...

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """The tensors that hold the state, by name; those that exist so far."""

    @abstractmethod
    def _accumulate(self, x: Tensor, dy: Tensor, weight: float | int) -> None: ...

    @abstractmethod
    def _merge_sums(self, other: "GradientStatistic") -> None: ...

    def n_bytes(self) -> int:
        """Memory that the accumulator holds for this layer alone."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def state_dict(self) -> dict[str, Tensor | float | int]:
        """Everything needed to continue the sum elsewhere."""
        return {**self.tensors(), "weight": self.weight, "n_calls": self.n_calls}

    def load_state_dict(self, state: dict[str, Tensor | float | int]) -> None:
        """Continue from `state_dict()` of an accumulator made with the same arguments.

        What was added here before is forgotten; the tensors of `state` are copied.

        Args:
            state: the numbers may be one-element tensors, as a safetensors file holds them.
        """
        for name in self.tensors():
            setattr(self, f"_{name}", None)
        state = dict(state)
        self.weight = float(state.pop("weight"))
        self.n_calls = int(state.pop("n_calls"))
        for name, tensor in state.items():
            setattr(self, f"_{name}", torch.as_tensor(tensor).clone())

    def _mean(self, total: Tensor) -> Tensor:
        return total / self.weight if self.weight else total


class DenseGradient(GradientStatistic):
    """Holds the `(out, in)` gradient itself, float32: exact.

    For small models, for layers so narrow that a sketch would be larger, and as the oracle of the
    tests. Memory: `4 * out * in` bytes.
    """

    _sum: Tensor | None = None

    def _accumulate(self, x: Tensor, dy: Tensor, weight: float | int) -> None:
        (total,) = self.sums(x.device)
        total.addmm_(dy.T, x, alpha=weight)

    def _merge_sums(self, other: GradientStatistic) -> None:
        for name, tensor in other.tensors().items():
            mine = getattr(self, f"_{name}")
            setattr(self, f"_{name}", tensor.clone() if mine is None else mine + tensor.to(mine))

    def sums(self, device: torch.device) -> list[Tensor]:  # noqa: D102
        if self._sum is None:
            self._sum = torch.zeros(self.shape, device=device)
        return [self._sum]

    def _existing_sums(self) -> list[Tensor]:
        return [] if self._sum is None else [self._sum]

    def tensors(self) -> dict[str, Tensor]:  # noqa: D102
        return {} if self._sum is None else {"sum": self._sum}

    def mean(self) -> Float[Tensor, "out in"]:
        """The mean gradient; zeros if nothing was added."""
        return torch.zeros(self.shape) if self._sum is None else self._mean(self._sum)

    def triplets(self, rank: int) -> TruncatedSVD:  # noqa: D102
        return truncated_svd(self.mean(), rank)

    def energy(self, triplets: TruncatedSVD | None = None) -> float:  # noqa: D102
        return self.mean().double().square().sum().item()
