"""LoRA layers with a start: the tuner model, the anchored pair, deferred adapters."""

from .deferred import deferred_adapters, is_deferred
from .model import GradInitModel
from .pairs import Pair, adapted_layers, live_targets, pairs
from .reshaping import WAYS_AROUND
