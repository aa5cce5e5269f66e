"""Recipes: what is fine-tuned on what, how, as a checked file; and the things that it names."""

try:
    from .data import encode, load_rows
    from .data_section import DataSection
    from .estimate import Estimate, estimate
    from .finetuning import finetune
    from .labels import Labels, labels_of
    from .lengths import sequence_length
    from .loading import load_recipe, section_of
    from .methods import adapter_config, calibration_of
    from .models import (
        empty_model,
        load_model,
        load_processor,
        location,
        model_config,
        task_of,
        untrained_modules,
    )
    from .reading import Reader
    from .schema import CalibrationSection, MethodSection, ModelSection
    from .values import read_yaml
except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
        f"recipes need {error.name}, which is not installed; pip install 'peft_gradinit[cli]'",
        name=error.name,
    ) from error

__all__ = [
    "CalibrationSection",
    "DataSection",
    "Estimate",
    "Labels",
    "MethodSection",
    "ModelSection",
    "Reader",
    "adapter_config",
    "calibration_of",
    "empty_model",
    "encode",
    "estimate",
    "finetune",
    "labels_of",
    "load_model",
    "load_processor",
    "load_recipe",
    "load_rows",
    "model_config",
    "read_yaml",
    "section_of",
    "sequence_length",
    "task_of",
    "untrained_modules",
]
