"""The second moment of a layer's inputs, as a sum over tokens.

Kept are `M = sum_t (x_t - c)(x_t - c)^T Omega`, `m = sum_t (x_t - c)`, `sum_t |x_t - c|^2` and the
number of tokens, in float32. They are sums, so the answer does not depend on how tokens were
batched, and two accumulators merge by adding. The principal components come from `M` by Nystrom
(`linalg.nystrom`); centred ones after `M - m m^T Omega / n`, which takes off the mean's part.

`c` is the mean of the first tokens (zero if components are not centred). Inputs of language models
have means that are far larger than their spread in some channels. With sums about `c`, taking off
the mean's part costs no digits; with sums about zero it would cost many.
"""

import math
from abc import abstractmethod
from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from ..linalg import Components, eigenpairs
from .base import Statistic
from .products import add_product, product_dtype


class InputStatistic(Statistic):
    """Accumulates the second moment of one layer's inputs.

    The sums are `M (in, width)`, of `(x - c)(x - c)^T Omega`; `m (in,)`, of `x - c`; and the scalar
    `squares`, of `|x - c|^2`. `centered` says whether components are of `x - mean` (principal
    components) or of `x`. `weight` counts tokens.
    """

    oriented_names = ("V",)

    def __init__(self, in_features: int, *, width: int, centered: bool = True) -> None:
        super().__init__()
        self.in_features = in_features
        self.width = width
        self.centered = centered

    @property
    def n_tokens(self) -> int:
        """`weight` as an integer."""
        return int(self.weight)

    def sum_shapes(self) -> Mapping[str, tuple[int, ...]]:  # noqa: D102
        return {"M": (self.in_features, self.width), "m": (self.in_features,), "squares": ()}

    @torch.no_grad()
    def add(self, x: Float[Tensor, "*batch in"]) -> None:
        """Add tokens; all leading dimensions are tokens, and there may be none."""
        self.n_calls += 1
        self.move(x.device)
        dtype = product_dtype(x)
        x = x.reshape(-1, self.in_features).float()
        if not len(x):
            return
        if self.centered and not self.has_sums:
            self._held["c"] = x.mean(0)
        M, m, squares = self.sums(x.device)
        if (c := self._held.get("c")) is not None:
            x = x - c
        rounded = x.to(dtype)
        add_product(M, rounded.T, self._project(rounded))
        m.add_(x.sum(0))
        squares.add_(torch.linalg.vector_norm(x).square())
        self.weight += len(x)

    def point(self, device: torch.device) -> Tensor:
        """The point `c` on which the sums are centred; zero on `device` before any token."""
        c = self._held.get("c")
        return self._zeros(self.in_features, device=device) if c is None else c

    def move_to(self, point: Tensor) -> None:
        """Re-centre the sums on `point` `(in,)`; of no effect if components are not centred."""
        if not self.centered:
            return
        if self.has_sums:
            point = point.to(self._held["m"])
            self._held |= self._about(point)
        self._held["c"] = point

    @abstractmethod
    def components(self, rank: int) -> Components:
        """Estimate the leading components of the mean second moment, at most `width` of them.

        Before any token: zeros and some orthonormal rows.
        """

    def energy(self) -> float:
        """Mean of `|x - mean|^2` (not centred: of `|x|^2`), the sum of all eigenvalues."""
        if not self.weight:
            return 0.0
        c = self._held.get("c")
        of_c = self._held["m"].new_zeros(()) if c is None else c.square().sum()
        parts = [self._held["squares"], self._held["m"].square().sum(), of_c]
        total, of_mean, of_c = torch.stack(parts).tolist()
        squares = total - of_mean / self.weight if self.centered else total
        rounding = 0.0 if c is None else self._rounding(total, of_c)
        return 0.0 if squares <= rounding < math.inf else squares / self.weight

    def mean(self) -> Float[Tensor, " in"]:
        """Mean of the tokens; zeros before any token."""
        if not self.weight:
            return self._zeros(self.in_features)
        mean = self._held["m"] / self.weight
        return mean + self.point(mean.device)

    def describe(self) -> str:  # noqa: D102
        return f"{type(self).__name__}(in {self.in_features}, centered {self.centered})"

    def _rounding(self, squares: float, of_c: float) -> float:
        """Largest sum of squares that constant inputs may give by rounding; `of_c` is `|c|^2`."""
        eps = torch.finfo(torch.float32).eps
        return eps * squares + (4 * eps) ** 2 * self.weight * of_c

    @staticmethod
    def _zeros(*size: int, device: torch.device | str = "cpu") -> Tensor:
        return torch.zeros(size, dtype=torch.float32, device=device)

    @abstractmethod
    def _project(self, rows: Tensor) -> Tensor:
        """`rows @ Omega`."""

    def _sums_about(self, other: Statistic) -> dict[str, Tensor]:
        point = other.point(self._held["m"].device)
        return super()._sums_about(other) if point is None else self._about(point)

    def _about(self, point: Tensor) -> dict[str, Tensor]:
        """The sums centred on another point `p`: `x - p = (x - c) + d` with `d = c - p`."""
        M, m, squares = (self._held[name] for name in self.sum_shapes())
        if (c := self._held.get("c")) is None:
            return {"M": M, "m": m, "squares": squares}
        n, d = self.weight, c - point.to(c)
        M = M + torch.outer(m, self._project(d)) + torch.outer(d, self._project(m + n * d))
        return {"M": M, "m": m + n * d, "squares": squares + 2 * (m @ d) + n * (d @ d)}

    def _mean_moment(self) -> Tensor:
        """`C Omega` for the second moment `C` per token, about the mean if centred."""
        if not self.weight:
            return self._zeros(self.in_features, self.width)
        M, m, n = self._held["M"], self._held["m"], self.weight
        if self.centered:
            M = M - torch.outer(m, self._project(m / n))
        return M / n


class DenseInputs(InputStatistic):
    """Holds the `(in, in)` second moment itself, float32: exact.

    For small models, for layers so narrow that a sketch would be larger, and as the oracle of the
    tests. Memory: `4 * in * in` bytes.
    """

    def __init__(self, in_features: int, *, centered: bool = True) -> None:
        super().__init__(in_features, width=in_features, centered=centered)

    def moment(self) -> Float[Tensor, "in in"]:
        """The second moment per token, symmetric; zeros before any token."""
        C = self._mean_moment()
        return (C + C.T) / 2

    def components(self, rank: int) -> Components:  # noqa: D102
        return eigenpairs(self._mean_moment(), rank)

    def _project(self, rows: Tensor) -> Tensor:
        return rows
