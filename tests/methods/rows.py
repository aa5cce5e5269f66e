"""The table of methods, and a start of any of them on a small model."""

import pytest
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from peft_gradinit.methods import METHODS
from tests.helpers import pico_llama, quiet, token_batches

FLOAT32 = 1e-5
"""Relative error of float32 logits that were computed in another order."""

INFO = {m.name: m for m in METHODS}
WITH_DATA = [m.name for m in METHODS if m.needed() != "nothing"]
WITH_GRADIENTS = [m.name for m in METHODS if m.needed() == "gradients"]
every_method = pytest.mark.parametrize("method", list(INFO))
with_data = pytest.mark.parametrize("method", WITH_DATA)
with_gradients = pytest.mark.parametrize("method", WITH_GRADIENTS)


def config_of(method: str, data=..., **options):
    """A config with small defaults; `data` are batches, or `token_batches()`."""
    values = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method in WITH_DATA:
        values |= {"lora_alpha": 8, "calibration": quiet(token_batches()) if data is ... else data}
    return INFO[method](**{**values, **options})


def started(
    method: str, model: nn.Module | None = None, name: str = "default", **options
) -> PeftModel:
    return get_peft_model(model or pico_llama(), config_of(method, **options), name)


def saved_factors(peft_model: PeftModel, directory) -> dict[str, tuple[Tensor, Tensor]]:
    """`(A, B)` by layer, as they stand in the file."""
    peft_model.save_pretrained(directory)
    entries = load_file(directory / "adapter_model.safetensors")
    stems = sorted(k.removesuffix(".lora_A.weight") for k in entries if ".lora_A." in k)
    assert len(entries) == 2 * len(stems)
    return {s: (entries[f"{s}.lora_A.weight"], entries[f"{s}.lora_B.weight"]) for s in stems}
