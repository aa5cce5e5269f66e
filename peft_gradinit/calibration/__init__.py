"""The calibration pass: runs the user's batches through the model and fills statistics.

Knows nothing of LoRA: it is given modules and accumulators, and returns facts.
"""

from .capture import capture
from .experts import ExpertWeight, Measurable
from .fingerprint import model_fingerprint, stored_weight, weight_hash, with_stored_weight
from .gradients import measure_gradients
from .guards import left_as_found
from .inputs import measure_inputs
from .layouts import assign, is_sharded, plain_name, unwrapped, whole, whole_modules
from .losses import base_loss, mean_loss
from .offloading import execution_device, has_offloaded, is_offloaded, offloaded_value, onloaded
from .plan import PassSize, Plan, Volume, plan_pass
from .processes import agreed
from .result import FILE_NAME, CalibrationResult, PassFacts
from .resume import Checkpoint
from .run import collect
from .shards import unsharded
from .spec import DEFERRED, Calibration
from .storage import is_hqq, is_packed

__all__ = [
    "DEFERRED",
    "FILE_NAME",
    "Calibration",
    "CalibrationResult",
    "Checkpoint",
    "ExpertWeight",
    "Measurable",
    "PassFacts",
    "PassSize",
    "Plan",
    "Volume",
    "agreed",
    "assign",
    "base_loss",
    "capture",
    "collect",
    "execution_device",
    "has_offloaded",
    "is_hqq",
    "is_offloaded",
    "is_packed",
    "is_sharded",
    "left_as_found",
    "mean_loss",
    "measure_gradients",
    "measure_inputs",
    "model_fingerprint",
    "offloaded_value",
    "onloaded",
    "plain_name",
    "plan_pass",
    "stored_weight",
    "unsharded",
    "unwrapped",
    "weight_hash",
    "whole",
    "whole_modules",
    "with_stored_weight",
]
