"""Comparison of two adapters, or of two calibrations, layer by layer."""

import dataclasses
import math
from collections.abc import Mapping

import torch

from ..calibration import CalibrationResult
from ..errors import AdapterError
from ..linalg import (
    Factors,
    TruncatedSVD,
    effective_rank,
    inner_product,
    principal_angles,
    rounding_of,
)
from ..records import SavedAdapter, same_layers

_NEGLIGIBLE = 1e-6
"""Singular values below this share of the largest are rounding errors of random direction."""


@dataclasses.dataclass(frozen=True)
class LayerComparison:
    """Comparison of two updates (or statistics) of one layer.

    Attributes:
        name: the layer.
        effective_ranks: effective ranks of both.
        input_angles: principal angles of the row spaces, radians, ascending.
        output_angles: those of the column spaces; empty if one of the two has none.
        cosine: cosine of the two updates as vectors; `None` for calibrations.
        distance: `|first - second| / |first|`, Frobenius, infinite if the first alone is zero; `None`
            for calibrations.
    """

    name: str
    effective_ranks: tuple[float, float]
    input_angles: tuple[float, ...]
    output_angles: tuple[float, ...]
    cosine: float | None = None
    distance: float | None = None


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Comparison of two adapters, or of two calibrations.

    Attributes:
        layers: the layers that both have.
        only_in_first: names of the layers that the second lacks.
        only_in_second: names of the layers that the first lacks.
    """

    layers: list[LayerComparison]
    only_in_first: tuple[str, ...]
    only_in_second: tuple[str, ...]


def compare_adapters(first: SavedAdapter, second: SavedAdapter) -> Comparison:
    """Compare two adapters of an untouched base, by the layers that both have."""
    for adapter in (first, second):
        adapter.check_untouched_base()
    lines = []
    for name in same_layers(first, second):
        one, other = first.layers[name], second.layers[name]
        norms = _norm(one), _norm(other)
        cosine, distance = _cosine_and_distance(inner_product(one, other), *norms)
        svds = (
            u.svd() if norm else u.svd().truncate(0)
            for u, norm in zip((one, other), norms, strict=True)
        )
        line = _angles(name, *svds)
        lines.append(dataclasses.replace(line, cosine=cosine, distance=distance))
    return Comparison(lines, *_of_one(first.layers, second.layers))


def _norm(update: Factors) -> float:
    """The Frobenius norm of an update; 0 if that is no more than rounding."""
    norm = math.sqrt(max(0.0, inner_product(update, update)))
    return norm if norm > rounding_of(update) else 0.0


def _cosine_and_distance(product: float, first: float, second: float) -> tuple[float, float]:
    """Of two updates, from their inner product and norms; two that are zero are not apart."""
    if not first:
        return 0.0, math.inf if second else 0.0
    if not second:
        return 0.0, 1.0
    squared = max(0.0, first**2 + second**2 - 2 * product)
    return product / (first * second), math.sqrt(squared) / first


def compare_calibrations(first: CalibrationResult, second: CalibrationResult) -> Comparison:
    """Compare the subspaces of every layer that two calibrations of one model have measured."""
    for result in (first, second):
        if not result.need.size(1):
            raise AdapterError(
                f"a calibration that holds {result.need.title} has no subspaces to compare; give "
                "calibrations of gradients or of inputs."
            )
    names = [name for name in first.triplets if name in second.triplets]
    if not names:
        raise AdapterError(
            "the two calibrations have no layer in common; give calibrations of one model."
        )
    for name in names:
        shapes = [tuple(of.fingerprint.targets[name][:2]) for of in (first, second)]
        if shapes[0] != shapes[1]:
            raise AdapterError(
                f"{name} is {shapes[0]} in the first calibration and {shapes[1]} in the second; "
                "give calibrations of one model."
            )
    lines = [_angles(name, first.triplets[name], second.triplets[name]) for name in names]
    return Comparison(lines, *_of_one(first.triplets, second.triplets))


def _of_one(
    first: Mapping[str, object], second: Mapping[str, object]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The names that the first has alone, and those that the second has alone."""
    return (
        tuple(name for name in first if name not in second),
        tuple(name for name in second if name not in first),
    )


def summary(lines: list[LayerComparison]) -> Mapping[str, float]:
    """Medians over the layers, by the words to print for them."""

    def median(values: list[float]) -> float:
        return torch.tensor(values, dtype=torch.float64, device="cpu").quantile(0.5).item()

    medians = {
        "median effective rank of the first": median([line.effective_ranks[0] for line in lines]),
        "median effective rank of the second": median([line.effective_ranks[1] for line in lines]),
    }
    for side in ("input", "output"):
        largest = [angles[-1] for line in lines if (angles := getattr(line, f"{side}_angles"))]
        if largest:
            medians[f"median of the largest {side} angles, degrees"] = math.degrees(median(largest))
    cosines = [line.cosine for line in lines if line.cosine is not None]
    return medians | ({"median cosine of the updates": median(cosines)} if cosines else {})


def _angles(name: str, first: TruncatedSVD, second: TruncatedSVD) -> LayerComparison:
    first, second = _significant(first), _significant(second)
    outputs = ()
    if first.U.shape[0] and second.U.shape[0]:
        outputs = tuple(principal_angles(first.U, second.U).tolist())
    return LayerComparison(
        name=name,
        effective_ranks=(effective_rank(first.S), effective_rank(second.S)),
        input_angles=tuple(principal_angles(first.Vh.T, second.Vh.T).tolist()),
        output_angles=outputs,
    )


def _significant(svd: TruncatedSVD) -> TruncatedSVD:
    if not len(svd.S):
        return svd
    return svd.truncate(int((_NEGLIGIBLE * svd.S[0] < svd.S).sum()))
