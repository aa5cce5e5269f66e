"""Starts for PEFT adapters, computed from the model's own gradients, activations and weights.

Importing the package registers its types with PEFT, so that `get_peft_model(model,
LoraGAConfig(…, calibration=data))` works.
"""

from .calibration import Calibration, CalibrationResult
from .errors import GradInitError
from .export import ExportReport, export_adapter
from .methods import EvaConfig, LoraGAConfig, LoraOneConfig, SVFitConfig
from .trainer import CalibrationCallback
from .tuners import (
    InitReport,
    LearningRate,
    calibrate,
    initialize,
    load_for_training,
    suggest_learning_rate,
)

__version__ = "0.1.0"

__all__ = [
    "Calibration",
    "CalibrationCallback",
    "CalibrationResult",
    "EvaConfig",
    "ExportReport",
    "GradInitError",
    "InitReport",
    "LearningRate",
    "LoraGAConfig",
    "LoraOneConfig",
    "SVFitConfig",
    "calibrate",
    "export_adapter",
    "initialize",
    "load_for_training",
    "suggest_learning_rate",
]
