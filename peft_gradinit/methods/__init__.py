"""One paper, one file; importing the package registers the types with PEFT."""

from ..tuners import GradInitModel, SVFitModel, register
from .eva import EvaConfig, eva_factors, eva_scores
from .lora_ga import LoraGAConfig, lora_ga_factors
from .svfit import SVFitConfig, svfit_basis, svfit_factors

__all__ = [
    "EvaConfig",
    "LoraGAConfig",
    "SVFitConfig",
    "eva_factors",
    "eva_scores",
    "lora_ga_factors",
    "svfit_basis",
    "svfit_factors",
]

register("eva", EvaConfig, GradInitModel)
register("lora_ga", LoraGAConfig, GradInitModel)
register("svfit", SVFitConfig, SVFitModel, prefix="svfit_")
