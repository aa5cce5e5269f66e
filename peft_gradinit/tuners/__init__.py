"""Tuner models and their registration with PEFT; no other room edits PEFT's objects."""

from .guidance import suggest_learning_rate
from .hosts import adapter_hosts
from .loading import check_base, load_for_training, restore_record, unknown_entries
from .lora import WAYS_AROUND, GradInitModel, Pair, deferred_adapters, pairs
from .registration import register
from .svfit import SVFitModel
from .verbs import calibrate, initialize
