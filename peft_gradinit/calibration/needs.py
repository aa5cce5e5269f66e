"""What a method needs of every layer, as data.

A method names its need: gradients, with some number of triplets for each rank; inputs; second
moments; or nothing but the weight. All that depends on the kind of statistic is a method of the
need, so that the pass, the allocation of ranks, the file and the report are the same for all.
"""

import dataclasses
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor

from ..errors import CalibrationError
from ..linalg import TruncatedSVD, double
from ..statistics import (
    DenseInputs,
    GradientStatistic,
    InputStatistic,
    Readouts,
    Statistic,
    TestMatrixPool,
    gradient_statistic,
    input_statistic,
)

Shape = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Estimator:
    """How the statistics of a pass are kept; see `Calibration` for the first three.

    `pool` holds the random test matrices, which layers of one dimension share.
    """

    estimator: str = "sketch"
    sketch_size: int | None = None
    seed: int = 0
    pool: TestMatrixPool = dataclasses.field(default_factory=TestMatrixPool)

    def options(self) -> dict[str, Any]:
        """Arguments of the functions that choose an accumulator."""
        return {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True)
class Need:
    """What a start needs of every layer.

    Attributes:
        statistic: name of the measured statistic in fingerprints and files.
        title: its name in tables of methods.
        norm: name of the square root of the energy in tables of calibrations.
        reads_data: whether a pass over data is needed.
        keep_batches: whether the result keeps the first batches, to measure a loss on them again.
        allocations: values of `rank_allocation` that it can serve.
    """

    statistic: ClassVar[str]
    title: ClassVar[str]
    norm: ClassVar[str] = ""
    reads_data: ClassVar[bool] = False
    keep_batches: ClassVar[bool] = False
    allocations: ClassVar[tuple[str, ...]] = ("uniform",)

    def rank_limit(self, shape: Shape) -> int:
        """The largest `r` that an `(out, in)` layer can have."""
        return min(shape)

    def size(self, r: int) -> int:
        """How many triplets a start of rank `r` uses; 0 if it uses none."""
        del r
        return 0

    def found(self, readouts: Readouts, r: int) -> int:
        """How many of the triplets of a start of rank `r` the data gave; the rest is rounding."""
        del readouts
        return self.size(r)

    def options(self) -> dict[str, Any]:
        """Options that shape the measurement. Those of a saved result must be the same."""
        return {}

    def shapes(self, shape: Shape, size: int) -> dict[str, tuple[int, ...]]:
        """Names and shapes of an `(out, in)` layer's readouts, if `size` triplets were read."""
        del shape, size
        return {}

    def is_whole(self, readouts: Readouts, shape: Shape, size: int) -> bool:
        """Whether readouts have the expected names and shapes."""
        found = {name: tuple(tensor.shape) for name, tensor in readouts.items()}
        return found == self.shapes(shape, size)

    def scores(self, readouts: Readouts, energy: float, allocation: str) -> Tensor:
        """The gain of each further rank of a layer, `(max rank,)`, for an allocation of ranks."""
        raise NotImplementedError(f"{type(self).__name__} serves no rank_allocation={allocation!r}")

    def captured(self, readouts: Readouts, r: int, energy: float) -> float | None:
        """Share of the energy that a start of rank `r` uses; `None` if there is no such share."""
        del readouts, r, energy
        return None


@dataclasses.dataclass(frozen=True)
class Measured(Need, ABC):
    """A need that a pass over data serves; with `backward`, the pass differentiates a loss."""

    reads_data = True
    backward: ClassVar[bool] = False

    @property
    def may_settle(self) -> bool:
        """Whether the pass may end before the budget, once the components have converged."""
        return False

    @abstractmethod
    def accumulator(self, shape: Shape, size: int, estimator: Estimator) -> Statistic:
        """An empty accumulator for an `(out, in)` layer; `size` triplets will be read from it."""

    @abstractmethod
    def token(self, shape: Shape, device: torch.device) -> tuple[Tensor, ...]:
        """Arguments of an accumulator's `add` for one token, without values."""

    @abstractmethod
    def failure(self, name: str, statistic: Any, unreached: str, n_batches: int) -> str | None:
        """Why a filled accumulator cannot be used; `None` if it can.

        `unreached` is the reason for a layer that never ran. Raises a `CalibrationError` if the
        measurement is not finite.
        """

    def read(self, statistic: Any, size: int) -> dict[str, Tensor]:
        """The readouts that the result keeps of a filled accumulator."""
        return self.read_alike([statistic], size)[0]

    @abstractmethod
    def read_alike(self, statistics: Sequence[Any], size: int) -> list[dict[str, Tensor]]:
        """The readouts of accumulators of one kind."""

    def energy(self, statistic: Any, readouts: Readouts) -> float:
        """The energy of a filled accumulator; its readouts may make the estimate more exact."""
        del readouts
        return statistic.energy()


@dataclasses.dataclass(frozen=True)
class _Triplets(Measured):
    """Needs the leading triplets `U`, `S`, `Vh` of a matrix, `per_rank` of them for each rank."""

    allocations = ("uniform", "explained_variance")
    rounding: ClassVar[float] = 8 * torch.finfo(torch.float32).eps
    """What rounding leaves of a singular value that is zero, as a share of the largest."""
    per_rank: int = 1

    def size(self, r: int) -> int:
        return self.per_rank * r

    def found(self, readouts: Readouts, r: int) -> int:
        S = readouts["S"]
        return int((self.rounding * S.max() < S[: self.size(r)]).sum())

    def shapes(self, shape: Shape, size: int) -> dict[str, tuple[int, ...]]:
        return {"U": (shape[0], size), "S": (size,), "Vh": (size, shape[1])}

    def scores(self, readouts: Readouts, energy: float, allocation: str) -> Tensor:
        """Sum of the squared singular values of each rank's triplets.

        For `"gradient_energy"` the sums are compared over all layers, for `"explained_variance"` as
        shares of their own layer's energy.
        """
        squares = double(readouts["S"]).square()
        n = len(squares) // self.per_rank
        gains = squares[: n * self.per_rank].unflatten(0, (n, self.per_rank)).sum(dim=1)
        return gains if allocation == "gradient_energy" else gains / max(energy, 1e-300)

    def captured(self, readouts: Readouts, r: int, energy: float) -> float | None:
        used = readouts["S"][: self.size(r)]
        return min(1.0, double(used).square().sum().item() / energy)


@dataclasses.dataclass(frozen=True)
class Gradients(_Triplets):
    """Needs triplets of the loss's gradient with respect to the weight."""

    statistic = "gradient"
    title = "gradients"
    norm = "|G|"
    backward = True
    allocations = (*_Triplets.allocations, "gradient_energy")
    keep_batches: bool = False  # pyright: ignore[reportIncompatibleVariableOverride]

    def rank_limit(self, shape: Shape) -> int:  # noqa: D102
        return min(shape) // self.per_rank

    def accumulator(self, shape: Shape, size: int, estimator: Estimator) -> GradientStatistic:  # noqa: D102
        return gradient_statistic(shape, rank=size, **estimator.options())

    def token(self, shape: Shape, device: torch.device) -> tuple[Tensor, ...]:  # noqa: D102
        return _token(shape[1], device), _token(shape[0], device)

    def failure(  # noqa: D102
        self, name: str, statistic: GradientStatistic, unreached: str, n_batches: int
    ) -> str | None:
        if not math.isfinite(energy := statistic.energy()):
            raise CalibrationError(
                f"the gradient of {name} is not finite (squared norm {energy}); the loss was, so its "
                "backward overflowed: calibrate in bfloat16 or float32, or on other data."
            )
        if statistic.n_calls == 0:
            return f"{unreached}, or the loss does not use it"
        return f"its gradient is zero over {n_batches} batches" if energy == 0.0 else None

    def read_alike(  # noqa: D102
        self, statistics: Sequence[GradientStatistic], size: int
    ) -> list[dict[str, Tensor]]:
        return [svd._asdict() for svd in statistics[0].triplets_alike(statistics, size)]

    def energy(self, statistic: GradientStatistic, readouts: Readouts) -> float:  # noqa: D102
        return statistic.energy(triplets_of(readouts))


@dataclasses.dataclass(frozen=True)
class Inputs(_Triplets):
    """Needs the principal components of the layer's inputs.

    They are read as triplets without `U` (`(0, size)`): `S` is the root mean square of the inputs
    along each row of `Vh`.

    Attributes:
        per_rank: components that a start uses for each rank.
        centered: components of `x - mean`, else of `x`.
        use_labels: count only tokens that carry loss, where batches have labels for each token.
        settle: end the pass when, in every layer, the components at one orientation of the sketches
            explain this share of what those at the next one explain. `None`: only budget or data
            end it.
    """

    statistic = "inputs"
    title = "inputs"
    norm = "std"
    rounding = _Triplets.rounding**0.5  # `S` is the root of a variance
    centered: bool = True
    use_labels: bool = True
    settle: float | None = None

    @property
    def may_settle(self) -> bool:  # noqa: D102
        return self.settle is not None

    def rank_limit(self, shape: Shape) -> int:  # noqa: D102
        return shape[1] // self.per_rank

    def options(self) -> dict[str, Any]:  # noqa: D102
        return {"centered": self.centered, "use_label_mask": self.use_labels}

    def accumulator(self, shape: Shape, size: int, estimator: Estimator) -> InputStatistic:  # noqa: D102
        rank = min(size, shape[1])
        options = estimator.options()
        return input_statistic(shape[1], rank=rank, centered=self.centered, **options)

    def token(self, shape: Shape, device: torch.device) -> tuple[Tensor, ...]:  # noqa: D102
        return (_token(shape[1], device),)

    def failure(  # noqa: D102
        self, name: str, statistic: InputStatistic, unreached: str, n_batches: int
    ) -> str | None:
        if not math.isfinite(energy := statistic.energy()):
            raise CalibrationError(
                f"the inputs of {name} are not finite (variance {energy}); calibrate in bfloat16 or "
                "float32, or on other data."
            )
        if statistic.n_calls == 0:
            return unreached
        if statistic.weight == 0:
            return f"none of its tokens carries loss in {n_batches} batches"
        kind = "constant" if statistic.centered else "zero"
        return f"its inputs are {kind} over {statistic.n_tokens} tokens" if energy == 0.0 else None

    def read_alike(  # noqa: D102
        self, statistics: Sequence[InputStatistic], size: int
    ) -> list[dict[str, Tensor]]:
        found = [one.components(min(size, one.in_features)) for one in statistics]
        return [
            {"U": Vh.new_zeros(0, len(variance)), "S": variance.sqrt(), "Vh": Vh}
            for Vh, variance in found
        ]

    def shapes(self, shape: Shape, size: int) -> dict[str, tuple[int, ...]]:  # noqa: D102
        return super().shapes((0, shape[1]), min(size, shape[1]))


@dataclasses.dataclass(frozen=True)
class SecondMoments(Inputs):
    """Needs the whole second moment `C = mean(x x^T)` of the layer's inputs, `(in, in)` float32.

    A sketch cannot serve, since `C` is inverted. One measurement serves every rank. Memory:
    `4 in^2` bytes for every distinct input, 64 MB at 4096.
    """

    statistic = "second_moment"
    title = "second moments of the inputs"
    norm = "rms"
    allocations = ("uniform",)
    centered: bool = False
    use_labels: bool = False

    def rank_limit(self, shape: Shape) -> int:  # noqa: D102
        return min(shape)

    def size(self, r: int) -> int:  # noqa: D102
        return 0

    def options(self) -> dict[str, Any]:  # noqa: D102
        return {}

    def accumulator(self, shape: Shape, size: int, estimator: Estimator) -> InputStatistic:  # noqa: D102
        return DenseInputs(shape[1], centered=False)

    def read_alike(  # noqa: D102
        self, statistics: Sequence[InputStatistic], size: int
    ) -> list[dict[str, Tensor]]:
        return [{"C": cast("DenseInputs", one).moment()} for one in statistics]

    def shapes(self, shape: Shape, size: int) -> dict[str, tuple[int, ...]]:  # noqa: D102
        return {"C": (shape[1], shape[1])}

    def found(self, readouts: Readouts, r: int) -> int:  # noqa: D102
        return 0

    def scores(self, readouts: Readouts, energy: float, allocation: str) -> Tensor:  # noqa: D102
        return Need.scores(self, readouts, energy, allocation)

    def captured(self, readouts: Readouts, r: int, energy: float) -> float | None:  # noqa: D102
        return None


@dataclasses.dataclass(frozen=True)
class Weights(Need):
    """Needs nothing but the weight itself: no data, no pass."""

    statistic = "weight"
    title = "nothing"


NEEDS: Mapping[str, type[Need]] = {
    need.statistic: need for need in (Gradients, Inputs, SecondMoments, Weights)
}
"""Needs by the name of their statistic."""


def _token(features: int, device: torch.device) -> Tensor:
    return torch.empty(1, features, dtype=torch.float32, device=device)


def triplets_of(readouts: Readouts) -> TruncatedSVD:
    """The triplets that readouts hold."""
    return TruncatedSVD(*(readouts[part] for part in TruncatedSVD._fields))
