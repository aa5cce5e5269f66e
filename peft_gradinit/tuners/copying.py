"""Adapters that are added as copies of another: TRL's reference adapter.

TRL adds the adapter `"ref"` to a `PeftModel` with the live config of the policy, and copies the
parameters that it finds by name. Constants, such as the anchor of LoRA-GA, are not among them, so
an adapter that is added with another's live config is made a whole copy of it here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn


def source_of(peft_config: Mapping[str, Any], adapter_name: str) -> str | None:
    """Name of the adapter whose live config a new adapter was given.

    Args:
        peft_config: configs by adapter name, the new one included.
        adapter_name: the new adapter.

    Returns:
        The other adapter's name; `None` if the config is the new adapter's own.
    """
    config = peft_config[adapter_name]
    return next((n for n, c in peft_config.items() if c is config and n != adapter_name), None)


@torch.no_grad()
def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Copy everything that one adapter holds, constants included, into another of the same shapes.

    Args:
        model: the base model with both adapters injected.
        source: the adapter to copy; it is not changed.
        target: the adapter to write; its `requires_grad` stays.
    """
    for layer in model.modules():
        if not isinstance(layer, BaseTunerLayer | AuxiliaryTrainingWrapper):
            continue
        tensors = dict([*layer.named_parameters(), *layer.named_buffers()])
        for name, tensor in tensors.items():
            kind, _, rest = name.partition(".")
            adapter, dot, rest = rest.partition(".")
            if adapter == source:  # the name follows the kind: lora_A.default.weight
                # The dtype is copied as well; an adapter may have been cast since it was made.
                tensors[f"{kind}.{target}{dot}{rest}"].data = tensor.detach().clone()
