"""SVFit adapters that the tests share."""

from peft import get_peft_model

from peft_gradinit import SVFitConfig
from peft_gradinit.tuners.svfit.layer import SVFitLinear
from tests.helpers import pico_gpt2

EXPORT = 1e-5
"""Relative error of float32 logits computed in another order."""


def svfit(**options):
    """A config with small defaults."""
    values = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return SVFitConfig(**{**values, **options})


def svfitted(model, name="default", **options):
    """`get_peft_model` with that config."""
    return get_peft_model(model, svfit(**options), name)


def gpt2_with_tied_head():
    """Conv1D layers, and a head that shares its weight with the embedding."""
    return svfitted(pico_gpt2(), target_modules=["c_attn", "c_proj", "lm_head"])


def layers_of(model):
    """The adapted layers by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, SVFitLinear)}
