"""Starts for PEFT adapters, computed from the model's own gradients, activations and weights.

Importing the package registers its types with PEFT, so that `get_peft_model(model,
LoraGAConfig(…, calibration=data))` works.
"""

from . import errors, optim
from .calibration import Calibration, CalibrationResult
from .errors import GradInitError
from .export import ExportReport, export_adapter
from .methods import (
    METHODS,
    CorDAConfig,
    EvaConfig,
    LoraGAConfig,
    LoraOneConfig,
    MiLoRAConfig,
    OLoRAConfig,
    PiSSAConfig,
    SVFitConfig,
)
from .records import InitReport, LearningRate, init_report
from .starts import GradInitConfig, with_output_layer
from .trainer import CalibrationCallback
from .tuners import (
    Pair,
    calibrate,
    initialize,
    load_for_training,
    pairs,
    register,
    suggest_learning_rate,
)

__version__ = "0.1.0"

for _method in METHODS:
    register(_method)

__all__ = [
    "Calibration",
    "CalibrationCallback",
    "CalibrationResult",
    "CorDAConfig",
    "EvaConfig",
    "ExportReport",
    "GradInitConfig",
    "GradInitError",
    "InitReport",
    "LearningRate",
    "LoraGAConfig",
    "LoraOneConfig",
    "MiLoRAConfig",
    "OLoRAConfig",
    "Pair",
    "PiSSAConfig",
    "SVFitConfig",
    "calibrate",
    "errors",
    "export_adapter",
    "init_report",
    "initialize",
    "load_for_training",
    "optim",
    "pairs",
    "suggest_learning_rate",
    "with_output_layer",
]
