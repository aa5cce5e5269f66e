"""The PEFT config and the calibration that a recipe asks for."""

from collections.abc import Mapping, Sequence
from typing import Any

from peft import PeftConfig
from peft.utils.constants import SEQ_CLS_HEAD_NAMES

from ..calibration import Calibration
from .collation import collator
from .schema import METHOD_CONFIGS, CalibrationSection, MethodSection
from .sections import Task

_PEFT_TASKS = {"IMAGE_CLS": None, "PREFERENCE": "CAUSAL_LM"}
"""Names of PEFT where they are others; it knows no task for images."""


def adapter_config(
    section: MethodSection, task: Task, calibration: Any = None, untrained: Sequence[str] = ()
) -> PeftConfig:
    """Make the config of a method.

    Args:
        section: method, rank, targets, options.
        task: what the model is for.
        calibration: what `calibration=` of the config takes; not used by methods without data.
        untrained: modules such as a new head, which are trained and saved as well (`untrained_modules`).

    Returns:
        The config.
    """
    config_class = METHOD_CONFIGS[section.name]
    values: dict[str, Any] = {
        "r": section.r,
        "target_modules": section.target_modules,
        "task_type": _PEFT_TASKS.get(task, task),
        **section.options,
    }
    if section.lora_alpha is not None:
        values["lora_alpha"] = section.lora_alpha
    if section.use_rslora:
        values["use_rslora"] = True
    if new := [name for name in untrained if not _is_saved(name, task, section.options)]:
        values["modules_to_save"] = [*(values.get("modules_to_save") or ()), *new]
    if calibration is not None and _reads_data(config_class):
        values["calibration"] = calibration
    return config_class(**values)


def _is_saved(name: str, task: Task, options: Mapping[str, Any]) -> bool:
    """Whether a module is one that PEFT is told to save, or a part of one."""
    saved = [*(options.get("modules_to_save") or ())]
    saved += SEQ_CLS_HEAD_NAMES if task == "SEQ_CLS" else []  # which PEFT adds
    return any(f".{part}." in f".{name}." for part in saved)


def _reads_data(config_class: Any) -> bool:
    return hasattr(config_class, "needed") and config_class.needed() != "nothing"


def calibration_of(data: Any, section: CalibrationSection, processor: Any, **more: Any) -> Any:
    """Make the `Calibration` of a recipe.

    Args:
        data: encoded rows.
        section: budgets and estimator; a saved result wins over the data.
        processor: pads the rows.
        more: further arguments of `Calibration`.

    Returns:
        What `calibration=` of a config takes.
    """
    if section.result is not None:
        return section.result
    return Calibration(
        data,
        max_tokens=section.max_tokens,
        max_batches=section.max_batches,
        batch_size=section.batch_size,
        estimator=section.estimator,
        sketch_size=section.sketch_size,
        seed=section.seed,
        collate_fn=collator(processor),
        **more,
    )
