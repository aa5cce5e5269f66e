"""The pass itself: one loop, and a recorder for each kind of statistic."""

from .gradients import GradientRecorder
from .loop import measure, run_pass
from .losses import base_loss, mean_loss, output_of
from .sharing import LayerStatistics
