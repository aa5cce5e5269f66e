"""The calibration pass: runs the user's batches through the model and fills statistics.

Knows nothing of LoRA: it is given modules and accumulators, and returns facts.
"""

from .capture import ExpertWeight, Measurable, capture
from .copying import own_copy
from .feed import Feed, lengths_within, unsharded
from .guards import left_as_found
from .needs import Gradients, Inputs, Measured, Need, SecondMoments, Weights, triplets_of
from .passes import (
    GradientRecorder,
    LayerStatistics,
    base_loss,
    mean_loss,
    measure,
    output_of,
    run_pass,
)
from .plan import PassSize, plan_pass
from .result import FILE_NAME, CalibrationResult, PassFacts
from .resume import Checkpoint
from .spec import DEFERRED, RESTORED, Calibration
