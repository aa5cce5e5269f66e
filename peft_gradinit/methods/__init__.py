"""One paper, one file; importing the package registers the types with PEFT."""

from ..tuners import GradInitModel, register
from .lora_ga import LoraGAConfig, lora_ga_factors

__all__ = ["LoraGAConfig", "lora_ga_factors"]

register("lora_ga", LoraGAConfig, GradInitModel)
