"""The callback that starts deferred adapters in `transformers.Trainer` and its subclasses."""

from .callback import SUGGESTED, CalibrationCallback
from .optimizers import is_like_adam
