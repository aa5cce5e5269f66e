"""The callback that starts deferred adapters in `transformers.Trainer` and its subclasses."""

from .callback import CalibrationCallback
from .optimizers import SUGGESTED, is_like_adam
