"""Hashes that tell which base model an adapter was made on."""

from typing import Any

from torch import nn

from ..layouts import model_fingerprint

_ADAPTER_PARAMETERS = (".lora_", ".svfit_", ".modules_to_save.", ".trainable_tokens_")


def base_fingerprint(model: nn.Module, config: Any) -> dict[str, str]:
    """Hashes of the base weights that an adapter depends on: all but modules trained in full."""
    hashes = base_hashes(model)
    heads = set(config.modules_to_save or ())
    return {name: value for name, value in hashes.items() if not heads & set(name.split("."))}


def base_hashes(model: nn.Module) -> dict[str, str]:
    """Hashes of all base weights, by their names in a model without adapters."""
    hashes = model_fingerprint(model, skip=_ADAPTER_PARAMETERS)
    return {name.replace(".token_adapter", ""): value for name, value in hashes.items()}
