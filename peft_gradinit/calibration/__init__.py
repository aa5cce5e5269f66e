"""The calibration pass: runs the user's batches through the model and fills statistics.

Knows nothing of LoRA: it is given modules and accumulators, and returns facts.
"""

from .capture import capture
from .experts import ExpertWeight, Measurable
from .fingerprint import model_fingerprint, stored_weight, with_stored_weight
from .gradients import measure_gradients
from .guards import left_as_found
from .inputs import measure_inputs
from .losses import base_loss, mean_loss
from .result import CalibrationResult, PassFacts
from .run import collect
from .spec import DEFERRED, Calibration

__all__ = [
    "DEFERRED",
    "Calibration",
    "CalibrationResult",
    "ExpertWeight",
    "Measurable",
    "PassFacts",
    "base_loss",
    "capture",
    "collect",
    "left_as_found",
    "mean_loss",
    "measure_gradients",
    "measure_inputs",
    "model_fingerprint",
    "stored_weight",
    "with_stored_weight",
]
