"""The streaming sketch of the second moment of a layer's inputs, and the choice of accumulator."""

import torch
from torch import Tensor

from ..errors import ShapeError
from ..linalg import Components, nystrom
from .gradient_sketch import TestMatrixPool, projected
from .inputs import DenseInputs, InputStatistic

N_RANDOM_COLUMNS = 24
"""Test columns that stay Gaussian and see what the oriented ones miss.

Of 112 columns, 8, 16, 24 and 40 do equally well on MiniLM (worst layer 0.9990 to 0.9991 of the
variance that PCA explains).
"""


class SketchedInputs(InputStatistic):
    """Holds `C Omega`, float32; the second moment `C` never exists.

    Until the first `orient()` the test matrix is Gaussian, drawn from the seed and the dimension
    alone; each `orient()` turns `width - 24` of its columns towards the leading components of the
    data so far. The sums are moved along without a second look at the data: the Gaussian columns
    keep their exact sums, and in the oriented ones `C_seen V = V Lambda` holds by the definition of
    eigenvectors.

    Memory: `4 * (2 * width - 24) * in` bytes: at 16 components (width 112) and 4096 inputs 3 MB,
    1/20 of `C`. Cost: `4 * width * in` flops a token, once for layers that share their input.
    """

    can_orient = True

    def __init__(
        self,
        in_features: int,
        *,
        width: int,
        seed: int = 0,
        pool: TestMatrixPool,
        centered: bool = True,
    ) -> None:
        super().__init__(in_features, width=width, centered=centered)
        self._seed = seed
        self._pool = pool

    @property
    def n_oriented(self) -> int:
        """How many test columns `orient()` replaces."""
        return self.width - N_RANDOM_COLUMNS

    def orient(self) -> None:
        """Turn the test matrix towards the components seen so far and move the sums to it."""
        if not self.weight:
            return
        M, m, n = self._held["M"], self._held["m"], self.weight
        seen = self.components(self.n_oriented)
        V = seen.Vh.T
        moved = V * (n * seen.variance)
        if self.centered:  # re-centre from the mean on c
            moved = moved + torch.outer(m, m @ V) / n
        self._held["V"] = V.contiguous()
        self._held["M"] = torch.cat([moved, M[:, self.n_oriented :]], dim=1)

    def components(self, rank: int) -> Components:  # noqa: D102
        moment = self._mean_moment()
        return nystrom(moment, self._test(moment.device), rank)

    def _project(self, rows: Tensor) -> Tensor:
        random = self._pool.get(
            self.in_features, self.width, 2 * self._seed, rows.device, rows.dtype
        )
        return projected(rows, self._rounded("V", rows.dtype), random)

    def _test(self, device: torch.device) -> Tensor:
        if (V := self._held.get("V")) is None:
            return self._random(device)
        return torch.cat([V, self._random(V.device)[:, self.n_oriented :]], dim=1)

    def _random(self, device: torch.device | str) -> Tensor:
        return self._pool.get(self.in_features, self.width, 2 * self._seed, device)

    def describe(self) -> str:  # noqa: D102
        return (
            f"SketchedInputs(in {self.in_features}, width {self.width}, seed {self._seed}, "
            f"centered {self.centered}, oriented {bool(self.oriented())})"
        )


def input_statistic(
    in_features: int,
    *,
    rank: int,
    estimator: str,
    sketch_size: int | None,
    seed: int,
    pool: TestMatrixPool,
    centered: bool = True,
) -> InputStatistic:
    """Choose the accumulator for one layer: a sketch, unless the dense one is smaller or asked for.

    Args:
        in_features: dimension of the layer's inputs.
        rank: components that will be asked for.
        estimator: `"sketch"` or `"dense"`.
        sketch_size: columns of the sketch; unused by `"dense"`. `None`: `2 * rank + 80`.
        seed: seed of the test matrix.
        pool: shared by the layers of one pass.
        centered: whether components are of `x - mean` or of `x`.

    Raises:
        ShapeError: if `estimator="sketch"` and `sketch_size` is too small for `rank`.
    """
    if estimator == "dense":
        return DenseInputs(in_features, centered=centered)
    default = 2 * rank + 80  # of MiniLM's 8 leading components, 96 columns find at least 0.998
    width = default if sketch_size is None else sketch_size
    if width < rank + N_RANDOM_COLUMNS:
        raise ShapeError(
            f"sketch_size={width} is too small for {rank} components; it needs at least "
            f"{rank + N_RANDOM_COLUMNS}, and {default} is the default."
        )
    if 2 * width - N_RANDOM_COLUMNS >= in_features:
        return DenseInputs(in_features, centered=centered)
    return SketchedInputs(in_features, width=width, seed=seed, pool=pool, centered=centered)
