"""From a model and a config to the factors of a start; the model is not edited here."""

from .allocation import resized, without_empty
from .base import base_fingerprint, base_hashes, base_name, check_no_head, is_trained_in_full
from .config import GradInitConfig
from .experts import scores_of_all
from .options import TARGET_WORDS
from .output import with_output_layer
from .spectral import SpectralConfig
from .start import Start, compute_start, measured, planned_targets
from .switching import adapter_alone, adapters_disabled, check_not_merged
from .target import Target
from .targets import (
    adapted_by_peft,
    matched_patterns,
    resolve_targets,
    targets_of,
    warn_of_idle,
    with_converted_targets,
    write_patterns,
)
from .weights import LINEAR_KINDS, is_quantized, linear_shape, linear_weight, loses_merges
