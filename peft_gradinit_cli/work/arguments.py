"""What the words of a command line stand for."""

import re
from collections.abc import Mapping
from typing import Any

import torch
import yaml

from peft_gradinit.errors import ConfigError
from peft_gradinit.recipes import (
    CalibrationSection,
    DataSection,
    MethodSection,
    ModelSection,
    read_yaml,
    section_of,
)
from peft_gradinit.starts import TARGET_WORDS

from .jobs import NO_DATA, Job

Fields = Mapping[str, Any]


def job_of(*, model: Fields, data: Fields, method: Fields, calibration: Fields) -> Job:
    """What is measured on what.

    Args:
        model: fields of the section.
        data: the same; without a path there are no data.
        method: the same, with targets and options as the command line has them.
        calibration: the same.

    Returns:
        The job.

    Raises:
        ConfigError: for preferences, whose loss only a trainer has.
    """
    if model["task"] == "PREFERENCE":
        raise ConfigError(
            "--task PREFERENCE cannot be calibrated beforehand, since its loss is that of the trainer; "
            "`peft-gradinit train RECIPE` starts the adapter from it."
        )
    targets, options = _names(method["target_modules"]), _options(method["options"])
    return Job(
        section_of(ModelSection, **model),
        section_of(DataSection, **{**data, "path": data["path"] or NO_DATA}),
        section_of(MethodSection, **{**method, "target_modules": targets, "options": options}),
        section_of(CalibrationSection, **calibration),
    )


def device_of(name: str) -> torch.device:
    """A device by its name.

    Args:
        name: from the command line.

    Returns:
        The device.

    Raises:
        ConfigError: if there is none of that name here.
    """
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch without CUDA asserts
        reason = str(error).partition("\n")[0]
        raise ConfigError(
            f"--device {name!r} cannot be used here ({reason}); `peft-gradinit doctor` lists what "
            "can."
        ) from error
    return device


def _names(text: str) -> str | list[str]:
    """Plain names become a list, in which PEFT looks for suffixes; else it is one regular expression."""
    names = [name.strip() for name in text.split(",")]
    if text in TARGET_WORDS or not all(re.fullmatch(r"[\w.]*", name) for name in names):
        return text
    return [name for name in names if name]


def _options(pairs: list[str]) -> dict[str, Any]:
    """Parse KEY=VALUE, the value as YAML.

    Args:
        pairs: from the command line.

    Returns:
        The values by key.

    Raises:
        ConfigError: if a pair has no `=`, or a value is not YAML.
    """
    return dict(map(_key_and_value, pairs))


def _key_and_value(pair: str) -> tuple[str, Any]:
    key, equals, value = pair.partition("=")
    if not equals:
        raise ConfigError(f"--option takes KEY=VALUE, got {pair!r}.")
    try:
        return key, read_yaml(value)
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"--option {pair!r}: the value is not YAML: {reason}.") from error
