"""One paper, one file; importing the package registers the types with PEFT."""

from .eva import EvaConfig, eva_factors
from .lora_ga import LoraGAConfig, lora_ga_factors
from .lora_one import LoraOneConfig, lora_one_factors
from .svfit import SVFitConfig, svfit_basis, svfit_factors
from .table import METHODS, MethodInfo

__all__ = [
    "METHODS",
    "EvaConfig",
    "LoraGAConfig",
    "LoraOneConfig",
    "MethodInfo",
    "SVFitConfig",
    "eva_factors",
    "lora_ga_factors",
    "lora_one_factors",
    "svfit_basis",
    "svfit_factors",
]
