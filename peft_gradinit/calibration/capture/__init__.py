"""Capture of the inputs of layers, and of the gradients of their outputs."""

from .arguments import ArgumentWatch
from .encoder import EncoderWatch, encoder_of
from .experts import ExpertWeight, Measurable, Product, why_unreached
from .following import Rows, watched
from .taps import Capture, capture, check_is_linear
