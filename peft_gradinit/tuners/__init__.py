"""The only package that edits PEFT objects: registration, the tuner model, the anchored pair."""

from .allocation import RankAllocation
from .config import GradInitConfig
from .guidance import LearningRate, suggest_learning_rate
from .model import GradInitModel
from .numbers import is_finite_number
from .pending import waiting_adapters
from .planning import planned_targets
from .provenance import read_provenance
from .registration import register
from .report import InitReport, ModuleReport, by_parameter
from .svfit_config import SpectralConfig
from .svfit_model import SVFitModel
from .targets import Target
from .verbs import calibrate, initialize, load_for_training
from .weights import is_quantized, linear_shape, linear_weight

__all__ = [
    "GradInitConfig",
    "GradInitModel",
    "InitReport",
    "LearningRate",
    "ModuleReport",
    "RankAllocation",
    "SVFitModel",
    "SpectralConfig",
    "Target",
    "by_parameter",
    "calibrate",
    "initialize",
    "is_finite_number",
    "is_quantized",
    "linear_shape",
    "linear_weight",
    "load_for_training",
    "planned_targets",
    "read_provenance",
    "register",
    "suggest_learning_rate",
    "waiting_adapters",
]
