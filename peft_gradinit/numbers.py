"""What counts as a number in an option: Python takes `True` for 1, which no user means."""

import math
from typing import TypeGuard


def is_integer(value: object) -> TypeGuard[int]:
    """Whether an option is an integer and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_finite_number(value: object) -> TypeGuard[float]:
    """Whether an option is a finite integer or float and not a bool."""
    return is_integer(value) or (isinstance(value, float) and math.isfinite(value))
