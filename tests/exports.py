"""Adapters to export, and readers that know nothing of this package."""

import json
import math

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from tests.helpers import pico_llama, train_steps
from tests.methods.rows import config_of

EXACT = 1e-5
"""Relative error of float32 logits that were computed in another order."""

PATTERNS = {
    "rank_pattern": {"k_proj": 2, "layers.1.mlp.up_proj": 7},
    "alpha_pattern": {"k_proj": 5, "down_proj": 3},
}
RANKS_AND_SCALES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "patterns": PATTERNS,
    "rslora-patterns": {"use_rslora": True, **PATTERNS},
}


def peft_lora(**options):
    """A config of PEFT itself whose start is not zero."""
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**{**values, "init_lora_weights": False, **options})


def config(method, **options):
    """A config of any method; `"lora"` is PEFT's own."""
    if method == "lora":
        return peft_lora(**options)
    if method == "svfit":
        options = {k: v for k, v in options.items() if k not in ("use_rslora", "alpha_pattern")}
    return config_of(method, **options)


def trained(method, model=None, name="default", **options):
    """A trained adapter on a pico Llama, or on another model."""
    peft_model = get_peft_model(model or pico_llama(), config(method, **options), name)
    train_steps(peft_model, n=3)
    return peft_model.eval()


def emptied(method="eva", model=None):
    """An adapter with layers of rank 0 between others of their kind."""
    return trained(method, model, r=1, lora_alpha=2, rho=3, min_rank=0)


def read(directory):
    """Config and entries of an adapter on disk."""
    content = json.loads((directory / "adapter_config.json").read_text())
    return content, load_file(directory / "adapter_model.safetensors")


def served(model, directory):
    """Add an adapter to a fresh model as servers do: one scale for all layers, no patterns."""
    content, tensors = read(directory)
    root = math.sqrt(content["r"]) if content["use_rslora"] else content["r"]
    scale = content["lora_alpha"] / root
    for key, A in tensors.items():
        if not key.endswith(".lora_A.weight"):
            continue
        B = tensors[key.replace("lora_A", "lora_B")]
        name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        module = model.get_submodule(name)
        delta = scale * B.float() @ A.float()
        with torch.no_grad():
            module.weight += delta if isinstance(module, nn.Linear) else delta.T
    return model
