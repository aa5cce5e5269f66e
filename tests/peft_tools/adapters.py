"""Live adapters and the plain LoRA adapters that they are saved as, on equal terms."""

import pytest
import torch
from peft import PeftModel

from peft_gradinit.methods import METHODS
from tests.exports import config, trained
from tests.helpers import pico_llama, token_batches, train_steps

EXACT = 1e-5
"""Relative error of float32 logits that were computed in another order."""

IDS = token_batches(4, 4)[0]["input_ids"]
NAMES = [m.name for m in METHODS]
every_method = pytest.mark.parametrize("method", NAMES)
every_form = pytest.mark.parametrize("form", ["live", "loaded"])


def adapter(method, form, directory):
    """A trained adapter: as it was trained, or saved and loaded as plain LoRA."""
    live = trained(method)
    if form == "live":
        return live
    live.save_pretrained(directory)
    return PeftModel.from_pretrained(pico_llama(), directory)


def another(method, r=4, steps=5):
    """An adapter with other weights than `adapter`'s."""
    peft_model = trained(method, r=r)
    train_steps(peft_model, steps)
    return peft_model.eval()


def two_adapters(method, form, directory):
    """Adapters `"default"` and `"second"`, the first active."""
    first = adapter(method, form, directory / "first")
    if form == "loaded":
        another(method).save_pretrained(directory / "second")
        first.load_adapter(directory / "second", "second")
        return first.eval()
    first.add_adapter("second", config(method, r=3))
    first.set_adapter("second")
    train_steps(first, 4)
    first.set_adapter("default")
    return first.eval()


def output(model, **options):
    """Logits on fixed data."""
    with torch.no_grad():
        return model(input_ids=IDS, **options).logits
