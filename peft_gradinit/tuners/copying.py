"""Adapters that are added as copies of another: TRL's reference adapter.

TRL adds the adapter `"ref"` to a `PeftModel` with the policy's own config object, and then copies
parameters by name. It misses constants, such as the anchor of LoRA-GA. So an adapter of that name
that shares another's config becomes a whole copy of it here.
"""

from collections.abc import Mapping
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import nn

REFERENCE = "ref"
"""TRL's name for its copy of the policy. Adapters of other names have starts of their own."""


def copied_from(peft_config: Mapping[str, Any], adapter_name: str) -> str | None:
    """Name of the adapter that a new one is a copy of; `None` if it has a start of its own."""
    config = peft_config[adapter_name]
    if adapter_name != REFERENCE:
        return None
    return next((n for n, c in peft_config.items() if c is config and n != adapter_name), None)


@torch.no_grad()
def copy_adapter(model: nn.Module, source: str, target: str) -> None:
    """Copy all tensors of an adapter, constants included, into another of the same shapes.

    The `requires_grad` of the target's tensors stays.
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
