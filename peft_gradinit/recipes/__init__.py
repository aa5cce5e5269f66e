"""Recipes: what is fine-tuned on what, how, as a checked file; and the things that it names."""

from .data import columns_of, encode, labels_of, load_rows
from .finetuning import finetune
from .loading import load_recipe, section_of
from .methods import adapter_config, calibration_of
from .models import empty_model, load_model, load_processor, model_config, task_of
from .schema import (
    METHOD_CONFIGS,
    CalibrationSection,
    DataSection,
    MethodSection,
    ModelSection,
    Recipe,
)

__all__ = [
    "METHOD_CONFIGS",
    "CalibrationSection",
    "DataSection",
    "MethodSection",
    "ModelSection",
    "Recipe",
    "adapter_config",
    "calibration_of",
    "columns_of",
    "empty_model",
    "encode",
    "finetune",
    "labels_of",
    "load_model",
    "load_processor",
    "load_recipe",
    "load_rows",
    "model_config",
    "section_of",
    "task_of",
]
