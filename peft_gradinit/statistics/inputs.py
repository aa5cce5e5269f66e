"""The second moment of a layer's inputs, as a sum over tokens.

Kept are `M = sum_t (x_t - c)(x_t - c)^T Omega`, `m = sum_t (x_t - c)`, `sum_t |x_t - c|^2` and the
number of tokens, in float32: sums, so that the answer does not depend on how tokens were batched,
and two accumulators merge by adding. The principal components come from `M` by Nystrom
(`linalg.nystrom`); centred ones after `M - m m^T Omega / n`, the mean's part of rank one.

`c` is the mean of the first tokens (zero if components are not centred). Inputs of language models
have means that are far larger than their spread in some channels; about `c`, subtracting the mean's
part costs no digits, where about zero it would cost as many as the mean has too much.
"""

import copy
from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from ..errors import ShapeError
from ..linalg import Components, eigenpairs


class Sums(NamedTuple):
    """Sums over tokens, about a point `c`.

    Attributes:
        M: `(in, width)`, of `(x - c)(x - c)^T Omega`.
        m: `(in,)`, of `x - c`.
        squares: scalar, of `|x - c|^2`.
    """

    M: Float[Tensor, "in width"]
    m: Float[Tensor, " in"]
    squares: Float[Tensor, ""]


class InputStatistic(ABC):
    """Accumulates the second moment of one layer's inputs.

    Attributes:
        in_features: dimension of the inputs.
        width: columns of the test matrix.
        centered: whether components are of `x - mean` (principal components) or of `x`.
        n_tokens: tokens so far.
        n_calls: how often the layer handed over inputs.
    """

    _sums: Sums | None = None
    _c: Tensor | None = None
    _V: Tensor | None = None

    def __init__(self, in_features: int, *, width: int, centered: bool = True) -> None:
        self.in_features = in_features
        self.width = width
        self.centered = centered
        self.n_tokens = self.n_calls = 0

    @torch.no_grad()
    def add(self, x: Float[Tensor, "*batch in"]) -> None:
        """Add tokens; all leading dimensions are tokens, and none of them at all is fine.

        Args:
            x: layer inputs, any floating dtype; not modified.
        """
        self.n_calls += 1
        x = x.reshape(-1, self.in_features).float()
        if not len(x):
            return
        if self._sums is None and self.centered:
            self._c = x.mean(0)
        sums = self.sums(x.device)
        if self._c is not None:
            x = x - self._c
        sums.M.addmm_(x.T, self._project(x))
        sums.m.add_(x.sum(0))
        sums.squares.add_(torch.linalg.vector_norm(x).square())
        self.n_tokens += len(x)

    def merge(self, other: "InputStatistic") -> None:
        """Add another accumulator of inputs of the same layer.

        Args:
            other: filled by another part of the data; not modified.

        Raises:
            ShapeError: if the two differ in kind, dimension, centring or test matrix.
        """
        if not self._same_test(other):
            raise ShapeError(
                f"cannot merge {other._describe()} into {self._describe()}; merge accumulators of "
                "one layer, seed and width, and orient all of them from the same data."
            )
        if self._sums is None:
            self._take_sums(other)
        elif other._sums is not None:
            theirs = other._about(other._sums, self._c)
            pairs = zip(self._sums, theirs, strict=True)
            self._sums = Sums(*(mine + part.to(mine) for mine, part in pairs))
        self.n_tokens += other.n_tokens
        self.n_calls += other.n_calls

    def sums(self, device: torch.device) -> Sums:
        """What adds up over parts of the data; zeros on `device` if nothing was added."""
        if self._sums is None:
            sizes = ((self.in_features, self.width), (self.in_features,), ())
            self._sums = Sums(*(torch.zeros(size, device=device) for size in sizes))
        return self._sums

    def point(self, device: torch.device) -> Tensor:
        """The point `c` that the sums are about; zero on `device` before any token."""
        return torch.zeros(self.in_features, device=device) if self._c is None else self._c

    def move_to(self, point: Tensor) -> None:
        """Take the sums about another point, so that they add up with others about it.

        Args:
            point: `(in,)`; of no effect if components are not centred.
        """
        if not self.centered:
            return
        if self._sums is not None and self._c is not None:
            self._sums = self._about(self._sums, point)
        self._c = point

    def clear(self) -> None:
        """Forget what was added, but not how it is measured."""
        for tensor in self._sums or ():
            tensor.zero_()
        self.n_tokens = self.n_calls = 0

    def orient(self) -> None:  # noqa: B027 optional for children
        """Adapt to the data seen so far; does nothing where nothing is to adapt."""

    def oriented(self) -> list[Tensor]:
        """What `orient` has made, which parts of the data that are summed later have to share."""
        return [] if self._V is None else [self._V]

    def copy(self) -> "InputStatistic":
        """An independent accumulator with the same state; the test matrix is shared."""
        new = copy.copy(self)
        new._take_sums(self)
        return new

    @abstractmethod
    def components(self, rank: int) -> Components:
        """Estimate the leading components of the mean second moment, per token.

        Args:
            rank: how many, at most `width`.

        Returns:
            Eigenvectors and eigenvalues; zeros and some orthonormal rows before any token.
        """

    def variance(self) -> float:
        """Mean of `|x - mean|^2` (not centred: of `|x|^2`), the sum of all eigenvalues."""
        if self._sums is None:
            return 0.0
        squares = self._sums.squares.item()
        if self.centered:
            squares -= self._sums.m.square().sum().item() / self.n_tokens
        return 0.0 if squares <= self._rounding() else squares / self.n_tokens

    def mean(self) -> Float[Tensor, " in"]:
        """Mean of the tokens; zeros before any token."""
        if self._sums is None:
            return torch.zeros(self.in_features)
        mean = self._sums.m / self.n_tokens
        return mean if self._c is None else mean + self._c

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that hold the state, by name; those that exist so far."""
        state = {} if self._sums is None else self._sums._asdict()
        state |= {"c": self._c, "V": self._V}
        return {name: tensor for name, tensor in state.items() if tensor is not None}

    def n_bytes(self) -> int:
        """Memory that the accumulator holds."""
        return sum(t.numel() * t.element_size() for t in self.tensors().values())

    def state_dict(self) -> dict[str, Tensor | int]:
        """Everything needed to continue the sum elsewhere."""
        return {**self.tensors(), "n_tokens": self.n_tokens, "n_calls": self.n_calls}

    def load_state_dict(self, state: dict[str, Tensor | int]) -> None:
        """Continue from `state_dict()` of an accumulator made with the same arguments.

        What was added here before is forgotten; the tensors of `state` are copied.

        Args:
            state: the numbers may be one-element tensors, as a safetensors file holds them.
        """
        self.n_tokens, self.n_calls = int(state["n_tokens"]), int(state["n_calls"])
        copies = {
            name: torch.as_tensor(state[name]).clone()
            for name in (*Sums._fields, "c", "V")
            if name in state
        }
        self._c, self._V = copies.pop("c", None), copies.pop("V", None)
        self._sums = Sums(**copies) if copies else None

    def _rounding(self) -> float:
        """What the squares of constant inputs may come to by rounding."""
        if self._sums is None or self._c is None:
            return 0.0
        eps = torch.finfo(torch.float32).eps
        of_c = (4 * eps) ** 2 * self.n_tokens * self._c.square().sum().item()
        return eps * self._sums.squares.item() + of_c

    @abstractmethod
    def _project(self, rows: Tensor) -> Tensor:
        """`rows @ Omega`."""

    def _same_test(self, other: "InputStatistic") -> bool:
        return self._describe() == other._describe()

    def _describe(self) -> str:
        return f"{type(self).__name__}(in {self.in_features}, centered {self.centered})"

    def _take_sums(self, other: "InputStatistic") -> None:
        self._c = other._c
        self._sums = None if other._sums is None else Sums(*(t.clone() for t in other._sums))

    def _about(self, sums: Sums, point: Tensor | None) -> Sums:
        """The sums about another point `p`: `x - p = (x - c) + d` with `d = c - p`, multiplied out."""
        (M, m, squares), n = sums, self.n_tokens
        if self._c is None or point is None:
            return sums
        d = self._c - point.to(self._c)
        M = M + torch.outer(m, self._project(d)) + torch.outer(d, self._project(m + n * d))
        return Sums(M, m + n * d, squares + 2 * (m @ d) + n * (d @ d))

    def _mean_moment(self) -> Tensor:
        """`C Omega` for the second moment `C` per token, about the mean if centred."""
        if self._sums is None:
            return torch.zeros(self.in_features, self.width)
        M, m, n = self._sums.M, self._sums.m, self.n_tokens
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

    def components(self, rank: int) -> Components:  # noqa: D102
        return eigenpairs(self._mean_moment(), rank)

    def _project(self, rows: Tensor) -> Tensor:
        return rows
