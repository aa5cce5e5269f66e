"""What counts as a number in an option: Python takes `True` for 1, which no user means."""

import dataclasses
import math
from typing import Any, TypeGuard

import numpy as np


def as_python(value: Any) -> Any:
    """A NumPy number as Python's, which JSON can hold; also in a dict, list or tuple. Other values stay."""
    if isinstance(value, np.generic):
        return value.item()
    parts = value.values() if isinstance(value, dict) else value
    if type(value) not in (dict, list, tuple) or not any(isinstance(v, np.generic) for v in parts):
        return value
    if isinstance(value, dict):
        return {key: as_python(v) for key, v in value.items()}
    return type(value)(map(as_python, value))


def use_python_numbers(options: Any) -> None:
    """Replace NumPy's numbers among the fields of a dataclass, which may be frozen."""
    for field in dataclasses.fields(options):
        object.__setattr__(options, field.name, as_python(getattr(options, field.name)))


def is_integer(value: object) -> TypeGuard[int]:
    """Whether an option is an integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether an option is a finite integer or float and not a bool."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))
