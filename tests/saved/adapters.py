"""Adapters on disk that the tests of this folder share."""

from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

from tests.helpers import logits, pico_llama, train_steps

TARGETS = ["q_proj", "v_proj", "down_proj"]


def lora_config(start=True, **options) -> LoraConfig:
    values = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**values, **options}, init_lora_weights=start)


def saved_lora(folder: Path, *, seed: int = 0, steps: int = 4, **options) -> Path:
    """A plain LoRA adapter of `pico_llama()`, trained a few steps."""
    base = pico_llama()
    torch.manual_seed(seed)  # of the adapter, after that of the model
    model = get_peft_model(base, lora_config(**options))
    train_steps(model, steps)
    model.save_pretrained(folder)
    return folder


def overwriting_start(folder: Path, config: LoraConfig, base=None) -> tuple[Tensor, PeftModel]:
    """Start, save as `initial`, train, save as `trained`; returns the trained logits."""
    model = get_peft_model(pico_llama() if base is None else base, config)
    model.save_pretrained(folder / "initial")
    train_steps(model, 4)
    model.save_pretrained(folder / "trained")
    return logits(model), model


def logits_on_fresh_base(folder: Path, base=None) -> Tensor:
    """Logits of a saved adapter as plain PEFT loads it on an untouched model."""
    base = pico_llama() if base is None else base
    return logits(PeftModel.from_pretrained(base, folder))
