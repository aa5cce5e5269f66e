"""The only package that edits PEFT objects: registration, the tuner model, the anchored pair."""

from .config import GradInitConfig
from .model import GradInitModel
from .registration import register
from .report import InitReport, ModuleReport
from .targets import Target
from .verbs import calibrate, initialize, load_for_training

__all__ = [
    "GradInitConfig",
    "GradInitModel",
    "InitReport",
    "ModuleReport",
    "Target",
    "calibrate",
    "initialize",
    "load_for_training",
    "register",
]
