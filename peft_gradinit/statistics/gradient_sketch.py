"""The gradient of a linear layer, sketched from both sides, and the choice between estimators."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..errors import ShapeError
from ..linalg import (
    TestMatrices,
    TruncatedSVD,
    double,
    draw_test_matrix,
    of_stack,
    orient_test_matrices,
    reconstruct,
)
from .gradient import DenseGradient, GradientStatistic
from .products import add_product

N_RANDOM_COLUMNS = 40
"""Test columns that stay Gaussian: they see what the oriented ones miss and estimate `|G|_F`.

Of 32, 40 and 56 of 112 columns, 40 gave the smallest worst-layer error on MiniLM.
"""


class SketchedGradient(GradientStatistic):
    """Holds `Y = G Omega` and `Z = G^T Psi`, float32; `G` never exists.

    Until the first `orient()` the test matrices are Gaussian, drawn from the seed and the layer's
    dimensions alone; each `orient()` turns `width - 40` of their columns towards the gradient seen
    so far (`linalg.sketch` says how and why). On MiniLM and 64 docstrings, at the default width and
    with orientation after 8 and 24 sequences, the rank-16 reconstruction has a median error of 1.04
    times the best possible one, 1.06 in the worst layer.

    Memory: `4 * (width + n_oriented) * (out + in)` bytes: at `rank=16` and 4096 x 4096, 1/11 of the
    dense gradient. Cost: `4 * width * (out + in)` flops a token, next to `4 * out * in` of the
    layer's forward and input gradient.
    """

    can_orient = True
    oriented_names = ("V", "U")

    def __init__(
        self, out_features: int, in_features: int, *, width: int, seed: int, pool: "TestMatrixPool"
    ) -> None:
        super().__init__(out_features, in_features)
        self.width = width
        self._seed = seed
        self._pool = pool

    @property
    def n_oriented(self) -> int:
        """How many test columns `orient()` replaces.

        At most two thirds: the reconstruction behind them needs more equations than unknowns.
        """
        return min(self.width - N_RANDOM_COLUMNS, 2 * self.width // 3)

    def sum_shapes(self) -> Mapping[str, tuple[int, ...]]:  # noqa: D102
        return {"Y": (self.shape[0], self.width), "Z": (self.shape[1], self.width)}

    def _accumulate(self, x: Tensor, dy: Tensor, weight: float | int) -> None:
        Y, Z = self.sums(x.device)
        add_product(Y, dy.T, self._projected(x, "V", 2 * self._seed), weight)
        add_product(Z, x.T, self._projected(dy, "U", 2 * self._seed + 1), weight)

    def orient(self) -> None:
        """Turn the test matrices towards the gradient seen so far and move the sums to them."""
        self.orient_alike([self])

    def orient_alike(self, group: Sequence[Any]) -> None:  # noqa: D102
        if not self.has_sums:
            return
        n = self.n_oriented
        for sketch, seen in zip(group, self._reconstructed(group, n, core=n), strict=True):
            sketch._turn(seen)

    def triplets(self, rank: int) -> TruncatedSVD:  # noqa: D102
        return self.triplets_alike([self], rank)[0]

    def triplets_alike(self, group: Sequence[Any], rank: int) -> list[TruncatedSVD]:  # noqa: D102
        seen = self._reconstructed(group, rank)
        return [
            svd._replace(S=svd.S / (sketch.weight or 1.0))
            for sketch, svd in zip(group, seen, strict=True)
        ]

    def _reconstructed(
        self, group: Sequence[Any], rank: int, core: int | None = None
    ) -> list[TruncatedSVD]:
        """Triplets of the sums of sketches of one kind."""

        def of(Y: Tensor, Z: Tensor, *test: Tensor) -> TruncatedSVD:
            return reconstruct(Y, Z, TestMatrices(*test), rank, core)

        return of_stack(of, [(*s._sums_or_zeros(), *s._test(s.device)) for s in group])

    def _sums_or_zeros(self) -> tuple[Tensor, Tensor]:
        if self.has_sums:
            return self._held["Y"], self._held["Z"]
        sizes = self.sum_shapes().values()
        Y, Z = (torch.zeros(size, dtype=torch.float32, device="cpu") for size in sizes)
        return Y, Z

    def _turn(self, seen: TruncatedSVD) -> None:
        Y, Z, n = self._held["Y"], self._held["Z"], self.n_oriented
        self._held = {
            # The Gaussian columns keep their exact sums; the oriented ones are U S and V S.
            "Y": torch.cat([seen.U * seen.S, Y[:, n:]], dim=1),
            "Z": torch.cat([seen.Vh.T * seen.S, Z[:, n:]], dim=1),
            "V": seen.Vh.T.contiguous(),
            "U": seen.U.contiguous(),
        }

    def energy(self, triplets: TruncatedSVD | None = None) -> float:
        """Estimate `|G|_F^2` from the Gaussian columns: `E |G omega|^2 = |G|_F^2 / in`.

        With `triplets(rank)` of an approximation `A`, the known `|A|_F^2` replaces its own noisy
        estimate (a control variate), which leaves only the noise of the difference. Not negative.
        """
        if not self.has_sums:
            return 0.0
        out_features, in_features = self.shape
        n = self.n_oriented if self.oriented() else 0
        test = self._random(self._held["Y"].device)
        Y, Z = (double(self._mean(name)[:, n:]) for name in "YZ")
        parts, known = [Y, Z], 0.0
        if triplets is not None:
            S = double(triplets.S)[:, None]
            parts += [S, S * double(triplets.Vh @ test.Omega[:, n:])]
            parts += [S * double(triplets.U.T @ test.Psi[:, n:])]
        squares = torch.stack([part.square().sum() for part in parts]).tolist()
        total = squares[0] * in_features + squares[1] * out_features
        if triplets is not None:
            known = squares[2]
            total -= squares[3] * in_features + squares[4] * out_features
        estimate = known + total / (2 * (self.width - n))
        return 0.0 if estimate < 0 else estimate  # `max` would lose a NaN

    def _projected(self, rows: Tensor, oriented: str, seed: int) -> Tensor:
        random = self._pool.get(rows.shape[1], self.width, seed, rows.device, rows.dtype)
        return projected(rows, self._rounded(oriented, rows.dtype), random)

    def describe(self) -> str:  # noqa: D102
        oriented = bool(self.oriented())
        return f"{super().describe()} (width {self.width}, seed {self._seed}, oriented {oriented})"

    def _test(self, device: torch.device | str) -> TestMatrices:
        random = self._random(device)
        if not self.oriented():
            return random
        return orient_test_matrices(self._held["U"], self._held["V"], random)

    def _random(self, device: torch.device | str) -> TestMatrices:
        out_features, in_features = self.shape
        return TestMatrices(
            self._pool.get(in_features, self.width, 2 * self._seed, device),
            self._pool.get(out_features, self.width, 2 * self._seed + 1, device),
        )


class TestMatrixPool:
    """Gaussian test matrices; layers of a pass share them where they have a dimension in common."""

    __test__ = False  # not a test class, whatever pytest makes of the name

    def __init__(self) -> None:
        self._drawn: dict[tuple[int, int, int, str, torch.dtype], Tensor] = {}

    def get(
        self,
        dimension: int,
        width: int,
        seed: int,
        device: torch.device | str,
        dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Return the `(dimension, width)` matrix of this seed on this device, rounded to a dtype."""
        key = (dimension, width, seed, str(device), dtype)
        if key not in self._drawn:
            drawn = draw_test_matrix(dimension, width, seed=seed, device=device)
            self._drawn[key] = drawn.to(dtype)
        return self._drawn[key]

    def n_bytes(self) -> int:
        """Memory that the matrices drawn so far hold."""
        return sum(t.numel() * t.element_size() for t in self._drawn.values())


def default_width(rank: int) -> int:
    """Columns at which the error of a rank-`rank` reconstruction stays near the best possible one.

    On MiniLM and 64 docstrings it is 1.02 to 1.04 times that for ranks from 4 to 16, and at most
    1.06 times in the worst layer. Memory and time grow with the columns.
    """
    return min(4 * rank + 48, 2 * rank + 80)


def gradient_statistic(
    shape: tuple[int, int],
    *,
    rank: int,
    estimator: str,
    sketch_size: int | None,
    seed: int,
    pool: TestMatrixPool,
) -> GradientStatistic:
    """Choose the accumulator for one layer: a sketch, unless the dense one is smaller or asked for.

    Args:
        shape: `(out, in)` of the layer.
        rank: triplets that will be asked for.
        estimator: `"sketch"` or `"dense"`.
        sketch_size: columns of the sketches; unused by `"dense"`. `None`: `default_width(rank)`.
        seed: seed of the test matrices.
        pool: shared by the layers of one pass.

    Raises:
        ShapeError: if `estimator="sketch"` and `sketch_size` is too small for `rank`.
    """
    out_features, in_features = shape
    if estimator == "dense":
        return DenseGradient(out_features, in_features)
    width = default_width(rank) if sketch_size is None else sketch_size
    if width < max(rank, N_RANDOM_COLUMNS) + 8:
        raise ShapeError(
            f"sketch_size={width} is too small for {rank} triplets; it needs at least "
            f"{max(rank, N_RANDOM_COLUMNS) + 8}, and {default_width(rank)} is the default."
        )
    sketch = SketchedGradient(out_features, in_features, width=width, seed=seed, pool=pool)
    n_floats = (width + sketch.n_oriented) * (out_features + in_features)
    if n_floats >= out_features * in_features:
        return DenseGradient(out_features, in_features)
    return sketch


def projected(rows: Tensor, oriented: Tensor | None, random: Tensor) -> Tensor:
    """Multiply by `[oriented | random]` without storing the concatenation for each layer."""
    if oriented is None or rows.dim() == 1:
        return rows @ (random if oriented is None else _joined(oriented, random))
    found, n = rows.new_empty(len(rows), random.shape[1]), oriented.shape[1]
    torch.mm(rows, oriented, out=found[:, :n])
    torch.mm(rows, random[:, n:], out=found[:, n:])
    return found


def _joined(oriented: Tensor, random: Tensor) -> Tensor:
    return torch.cat([oriented, random[:, oriented.shape[1] :]], dim=1)
