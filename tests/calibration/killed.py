"""A pass that is killed and continued; a process that is to be killed runs it, too."""

from peft_gradinit import Calibration, calibrate
from tests.helpers import pico_llama, token_batches

BATCHES = token_batches(90, batch_size=5)
"""Orientations fall after 8, 24 and 72 sequences, two of them inside a batch."""

WIDE = {"hidden_size": 384, "intermediate_size": 512, "num_hidden_layers": 1}
"""Wide enough that the sketches are not exact."""


def config_of(method, **options):
    return method(r=2, target_modules="all-linear", calibration="deferred", **options)


def measured(method, data, checkpoint=None, **options):
    config = config_of(method, **options) if options else config_of(method, rho=1)
    estimator = "sketch"
    pass_ = Calibration(data, progress=False, estimator=estimator, checkpoint=checkpoint)
    return calibrate(pico_llama(**WIDE), config, pass_)
