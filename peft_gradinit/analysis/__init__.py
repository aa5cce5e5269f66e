"""Comparing, converting and drawing adapters and calibrations; no model runs here."""

from .comparison import Comparison, LayerComparison, compare_adapters, compare_calibrations, summary
from .conversion import convert, initial_update, recomputed_update, residual_update
from .intruders import THRESHOLD, TOP, LayerIntruders, find_intruders, mitigated_updates
from .plots import (
    check_available,
    draw_angles,
    draw_drift,
    draw_losses,
    draw_rank_map,
    draw_spectra,
    is_available,
    places_of,
)
from .suggestions import suggested_ranks
