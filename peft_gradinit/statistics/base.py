"""What all statistics are: sums over the data of one layer, which merge by adding.

A statistic holds tensors by name. Its *sums* add up over parts of the data. The other tensors say
how the sums are taken: oriented test matrices, and the point on which the sums are centred. Parts
can be added only if they share those.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from ..errors import ShapeError

S = TypeVar("S", bound="Statistic")


class Statistic(ABC):
    """A sum over the data of one layer, in float32.

    Attributes:
        weight: what the sums are divided by at the end: the tokens that counted.
        n_calls: how often the layer handed something over.
    """

    can_orient: ClassVar[bool] = False
    """Whether `orient` changes anything."""

    oriented_names: ClassVar[tuple[str, ...]] = ()
    """Names of the tensors that `orient` computes."""

    def __init__(self) -> None:
        self.weight = 0.0
        self.n_calls = 0
        self._held: dict[str, Tensor] = {}
        self._copies: dict[str, tuple[Tensor, Tensor]] = {}

    @abstractmethod
    def sum_shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Names and shapes of the sums."""

    @abstractmethod
    def describe(self) -> str:
        """Kind, shape and options. Accumulators that differ in them cannot be merged."""

    @abstractmethod
    def energy(self) -> float:
        """Sum of the squares of all singular values of the mean."""

    @property
    def has_sums(self) -> bool:
        """Whether the tensors of the sums exist."""
        return next(iter(self.sum_shapes())) in self._held

    def sums(self, device: torch.device) -> list[Tensor]:
        """The tensors that add up over parts of the data; new zeros on `device` at first."""
        shapes = self.sum_shapes()
        if not self.has_sums:
            self._held |= {
                name: torch.zeros(size, dtype=torch.float32, device=device)
                for name, size in shapes.items()
            }
        return [self._held[name] for name in shapes]

    @property
    def device(self) -> torch.device:
        """Where its tensors are; the CPU before there are any."""
        return next((t.device for t in self._held.values()), torch.device("cpu"))

    def move(self, device: torch.device) -> None:
        """Continue on the device where the layer runs; elsewhere are sums of other processes or runs."""
        if any(tensor.device != device for tensor in self._held.values()):
            self._held = {name: tensor.to(device) for name, tensor in self._held.items()}

    def orient(self) -> None:  # noqa: B027 optional for children
        """Adapt the test matrices to the data seen so far. Does nothing where there are none."""

    def orient_alike(self, group: Sequence[Any]) -> None:
        """Orient statistics of one kind: this one is among them."""
        for statistic in group:
            statistic.orient()

    def oriented(self) -> list[Tensor]:
        """The test matrices that `orient` computed. Accumulators must share them before a merge."""
        return [self._held[name] for name in self.oriented_names if name in self._held]

    def point(self, device: torch.device) -> Tensor | None:
        """The point on which the sums are centred; `None` for statistics without such a point."""
        del device
        return None

    def move_to(self, point: Tensor) -> None:  # noqa: B027 optional for children
        """Re-centre the sums on `point`, so that they can be added to others centred there."""

    def clear(self) -> None:
        """Set the sums to zero. Test matrices and the point stay."""
        for name in self.sum_shapes():
            if name in self._held:
                self._held[name].zero_()
        self.weight, self.n_calls = 0.0, 0

    def merge(self: S, other: S) -> None:
        """Add another accumulator of the same layer; it is not modified.

        Raises:
            ShapeError: if the two differ in kind, shape, options or test matrices.
        """
        if self.describe() != other.describe() or not self._same_test(other):
            raise ShapeError(
                f"cannot merge {other.describe()} into {self.describe()}; merge accumulators of one "
                "layer, seed and width, and orient all of them from the same data."
            )
        if not self.has_sums:
            self._take(other)
        elif other.has_sums:
            for name, theirs in other._sums_about(self).items():
                self._held[name] = self._held[name] + theirs.to(self._held[name])
        self.weight += other.weight
        self.n_calls += other.n_calls

    def copy(self: S) -> S:
        """An independent accumulator with the same state. Test matrices are shared."""
        new = copy.copy(self)
        new._held, new._copies = {}, {}
        new._take(self)
        return new

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that exist so far, by name."""
        return dict(self._held)

    def n_bytes(self) -> int:
        """Memory that the accumulator holds for this layer alone."""
        held = [*self._held.values(), *(rounded for _, rounded in self._copies.values())]
        return sum(t.numel() * t.element_size() for t in held)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue the sum elsewhere."""
        return {**self._held, "weight": self.weight, "n_calls": self.n_calls}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from `state_dict()` of an accumulator made with the same arguments.

        Tensors are copied, and what was added here before is forgotten. Numbers may be one-element
        tensors, as a safetensors file holds them.
        """
        state = dict(state)
        self.weight, self.n_calls = float(state.pop("weight")), int(state.pop("n_calls"))
        self._held = {name: torch.as_tensor(tensor).clone() for name, tensor in state.items()}

    def _rounded(self, name: str, dtype: torch.dtype) -> Tensor | None:
        """A tensor in another dtype, or `None` if there is no such tensor yet; one copy is kept."""
        tensor = self._held.get(name)
        if tensor is None or tensor.dtype == dtype:
            return tensor
        known = self._copies.get(name)
        if known is None or known[0] is not tensor or known[1].dtype != dtype:
            known = self._copies[name] = (tensor, tensor.to(dtype))
        return known[1]

    def _mean(self, name: str) -> Tensor:
        total = self._held[name]
        return total / self.weight if self.weight else total

    def _take(self, other: "Statistic") -> None:
        """Copy the sums of another accumulator, and share its test matrices and its point."""
        sums = self.sum_shapes()
        self._held |= {n: t.clone() if n in sums else t for n, t in other._held.items()}

    def _sums_about(self, other: "Statistic") -> dict[str, Tensor]:
        """The sums, centred on the point of `other`, so that they can be added to its sums."""
        del other
        return {name: self._held[name] for name in self.sum_shapes()}

    def _same_test(self, other: "Statistic") -> bool:
        mine, theirs = self.oriented(), other.oriented()
        return len(mine) == len(theirs) and all(
            torch.equal(one, two.to(one)) for one, two in zip(mine, theirs, strict=True)
        )
