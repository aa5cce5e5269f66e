"""What a calibration pass measures: mergeable accumulators and the file that keeps their result."""

from .gradient import DenseGradient, GradientStatistic
from .gradient_sketch import SketchedGradient, TestMatrixPool, gradient_statistic
from .input_sketch import SketchedInputs, input_statistic
from .inputs import DenseInputs, InputStatistic
from .store import Fingerprint, hash_weight, load_batches, load_triplets, save_triplets

__all__ = [
    "DenseGradient",
    "DenseInputs",
    "Fingerprint",
    "GradientStatistic",
    "InputStatistic",
    "SketchedGradient",
    "SketchedInputs",
    "TestMatrixPool",
    "gradient_statistic",
    "hash_weight",
    "input_statistic",
    "load_batches",
    "load_triplets",
    "save_triplets",
]
