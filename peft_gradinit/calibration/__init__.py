"""The calibration pass: runs the user's batches through the model and fills statistics.

Knows nothing of LoRA: it is given modules and accumulators, and returns facts.
"""

from .capture import capture
from .fingerprint import model_fingerprint
from .gradients import measure_gradients
from .guards import left_as_found
from .inputs import measure_inputs
from .result import FILE_NAME, CalibrationResult, PassFacts
from .resume import Checkpoint
from .run import collect
from .spec import DEFERRED, Calibration

__all__ = [
    "DEFERRED",
    "FILE_NAME",
    "Calibration",
    "CalibrationResult",
    "Checkpoint",
    "PassFacts",
    "capture",
    "collect",
    "left_as_found",
    "measure_gradients",
    "measure_inputs",
    "model_fingerprint",
]
