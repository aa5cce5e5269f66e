"""Layers that train singular values: the tuner model, the layer, the saved forms."""

from .model import SVFitModel
from .saving import live_layers
