"""Llama-shaped models with random weights for `bench_calibration.py`, on any device.

Weights are made layer by layer where the model runs, so that 7B needs neither a download nor the
memory of a second copy.
"""

from collections.abc import Iterable
from typing import Any

import smollm2_chats
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from peft_gradinit.recipes.embedded import smollm2_folder

SHAPES: dict[str, dict[str, int]] = {
    "1b": {  # Llama 3.2 1B
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "7b": {  # Llama 2 7B
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "vocab_size": 32000,
    },
}
"""Shapes of published models."""

VOCABULARY = 4096  # small, so that the head does not hide the cost of the layers
INIT_STD = 0.02


def make_model(
    name: str, *, device: str = "cpu", dtype: str = "float32", bits: int | None = None, **size: int
) -> LlamaForCausalLM:
    """Make a frozen model in eval mode.

    Args:
        name: `"smollm2"`, one of `SHAPES`, or `"random"` with `hidden` and `layers`.
        device: where it runs.
        dtype: of its weights.
        bits: 4 quantises the linear layers of the blocks by bitsandbytes (NF4).
        size: `hidden` and `layers`, for `"random"`.

    Returns:
        The model.
    """
    if name == "smollm2":
        of_file = LlamaForCausalLM.from_pretrained(smollm2_folder(), dtype=getattr(torch, dtype))
        return of_file.to(device).requires_grad_(False)
    shape = SHAPES[name] if name in SHAPES else _shape(**size)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, dtype))
    try:
        with torch.device("meta"):
            model = LlamaForCausalLM(LlamaConfig(**shape, use_cache=False))
    finally:
        torch.set_default_dtype(before)
    if bits == 4:
        _quantise(model.model.layers, device)
    for module in model.modules():
        _materialise(module, device)
    return model.eval()


def batches(name: str, n: int, size: int, length: int, device: str, vocabulary: int) -> list[dict]:
    """Random tokens, every one of which carries loss; for SmolLM2, functions as chats."""
    if name == "smollm2":
        chats = smollm2_chats.loader(n * size, size)
        return [{k: v.to(device) for k, v in batch.items()} for batch in chats]
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, vocabulary, (size, length), generator=generator) for _ in range(n)]
    return [{"input_ids": ids.to(device), "labels": ids.to(device)} for ids in rows]


def _shape(hidden: int, layers: int) -> dict[str, int]:
    return {
        "hidden_size": hidden,
        "intermediate_size": hidden * 8 // 3 // 64 * 64,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "vocab_size": VOCABULARY,
    }


def _quantise(blocks: Iterable[nn.Module], device: str) -> None:
    """Replace the linear layers of blocks, one at a time, by those of bitsandbytes."""
    import bitsandbytes as bnb

    for block in blocks:
        for name, layer in list(block.named_modules()):
            if not isinstance(layer, nn.Linear):
                continue
            options: Any = {"bias": False, "quant_type": "nf4", "compute_dtype": layer.weight.dtype}
            small = bnb.nn.Linear4bit(layer.in_features, layer.out_features, **options)
            weight = _random(layer.weight, "cpu")
            small.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
            block.set_submodule(name, small.to(device))


def _materialise(module: nn.Module, device: str) -> None:
    """Give a module's own weights values, and compute its buffers where they belong."""
    for name, parameter in list(module.named_parameters(recurse=False)):
        if parameter.is_meta:
            value = _random(parameter, device)
            if parameter.dim() == 1:  # of a norm
                value.fill_(1.0)
            setattr(module, name, nn.Parameter(value, requires_grad=False))
    if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
        with torch.device(device):  # rotary frequencies, which follow from the config
            fresh = type(module)(module.config)
        for name, buffer in fresh.named_buffers(recurse=False):
            module.register_buffer(name, buffer, persistent=False)


def _random(like: Tensor, device: str) -> Tensor:
    return torch.empty(like.shape, dtype=like.dtype, device=device).normal_(0.0, INIT_STD)
