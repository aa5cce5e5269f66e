"""Adapters on disk: read, compared, converted; no model runs here."""

from .adapters import SavedAdapter, read_adapter, relative_norm, write_adapter
from .comparison import LayerComparison, compare_adapters, compare_calibrations, summary
from .conversion import Converted, convert, initial_update, recomputed_update, residual_update
from .intruders import LayerIntruders, find_intruders, mitigated_updates
from .suggestions import suggested_ranks

__all__ = [
    "Converted",
    "LayerComparison",
    "LayerIntruders",
    "SavedAdapter",
    "compare_adapters",
    "compare_calibrations",
    "convert",
    "find_intruders",
    "initial_update",
    "mitigated_updates",
    "read_adapter",
    "recomputed_update",
    "relative_norm",
    "residual_update",
    "suggested_ranks",
    "summary",
    "write_adapter",
]
