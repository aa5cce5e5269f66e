"""What a calibration pass measures: mergeable accumulators and the file that keeps their result."""

from .gradient import (
    DenseGradient,
    GradientStatistic,
    SketchedGradient,
    TestMatrixPool,
    gradient_statistic,
)
from .store import Fingerprint, hash_weight, load_triplets, save_triplets

__all__ = [
    "DenseGradient",
    "Fingerprint",
    "GradientStatistic",
    "SketchedGradient",
    "TestMatrixPool",
    "gradient_statistic",
    "hash_weight",
    "load_triplets",
    "save_triplets",
]
