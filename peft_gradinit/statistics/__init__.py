"""What a calibration pass measures: mergeable accumulators and the file that keeps their result."""

from .base import Statistic
from .gradient import DenseGradient, GradientStatistic
from .gradient_sketch import SketchedGradient, TestMatrixPool, gradient_statistic
from .groups import in_groups
from .input_sketch import SketchedInputs, input_statistic
from .inputs import DenseInputs, InputStatistic
from .products import product_dtype
from .store import (
    Fingerprint,
    Readouts,
    batch_entries,
    batches_of,
    digest,
    load_readouts,
    save_readouts,
)
