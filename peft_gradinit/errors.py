"""Every error that this package raises on purpose, and the one way in which it warns.

Each child also subclasses the built-in that users of PEFT and Transformers already catch, so that
`except ValueError` keeps working. Messages say what is wrong and where, what was expected, what
was got, and what to do.
"""

import sys
import types
import warnings
from collections.abc import Sequence


class GradInitError(Exception):
    """Base of all errors raised by `peft_gradinit`."""


class ConfigError(GradInitError, ValueError):
    """An option of a config or of a `Calibration` has a value that cannot work."""


class ShapeError(GradInitError, ValueError):
    """A matrix or a rank does not fit the place where it is used."""


class TargetError(GradInitError, ValueError):
    """A targeted module cannot be served by the method."""


class DataError(GradInitError, ValueError):
    """The calibration data are empty, carry no labels, or have a form that is not understood."""


class CalibrationError(GradInitError, RuntimeError):
    """The calibration pass ran but cannot give a usable result."""


class FingerprintError(GradInitError, ValueError):
    """A saved calibration belongs to another model, other targets or other options."""


OTHER_DTYPE = (
    "A float16 copy of a base counts as another one, as its rounding differs; float32 and bfloat16 "
    "copies count as one."
)
"""What errors say about hashes of weights that differ."""


class NotInitializedError(GradInitError, RuntimeError):
    """A deferred adapter was trained or saved before it was initialised."""


class AdapterError(GradInitError, ValueError):
    """A saved adapter is missing, damaged, or of a kind that cannot be read here."""


class OutputError(GradInitError, OSError):
    """A result cannot be written where it should go."""


class ExportError(GradInitError, ValueError):
    """An adapter cannot be written in the form or to the place that was asked for."""


_LIBRARIES = frozenset({
    "peft_gradinit",
    "peft",
    "transformers",
    "accelerate",
    "trl",
    "torch",
    "pydantic",
})
"""Packages that stand between the user's line and a warning."""


def warn(message: str) -> None:
    """Warn, and point at the user's line: the nearest one outside of this package and its hosts."""
    frame, level = sys._getframe(1), 2
    while frame.f_back is not None and _package(frame) in _LIBRARIES | {"contextlib"}:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, UserWarning, stacklevel=level)


def first_of(names: Sequence[str], separator: str = ", ") -> str:
    """The first three names, for a message, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return separator.join(names[:3]) + more


def _package(frame: types.FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]
