"""Weighted combinations of adapters: plain LoRA, at the ranks that the live layers have."""

import dataclasses
import re
from typing import Any

from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import nn

from ..errors import ConfigError

_KEEPS_RANKS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def combined_config(
    model: nn.Module, adapters: list[str], kind: str, proposed: LoraConfig
) -> LoraConfig:
    """The config of a combination: every layer that one of the adapters has, and no other.

    PEFT's own takes the first adapter's patterns away and its exclusions over, which does not fit
    layers of different ranks.

    Args:
        model: the model that has the adapters.
        adapters: their names.
        kind: PEFT's `combination_type`.
        proposed: PEFT's config, whose `r` is that of the combination.

    Returns:
        A plain `LoraConfig` with scaling 1 in every layer.

    Raises:
        ConfigError: if the kind needs equal ranks and a layer has others.
    """
    ranks = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer):
            dims: Any = (layer.in_features, layer.out_features)
            having = [layer.r[adapter] for adapter in adapters if adapter in layer.r]
            if having:
                largest = min(proposed.r, *dims)
                ranks[name] = _rank(name, having, kind, largest)
    r = max(ranks.values(), default=proposed.r)
    lower = {f"^{re.escape(name)}": rank for name, rank in ranks.items() if rank != r}
    return dataclasses.replace(
        plain_config(proposed),
        r=r,
        lora_alpha=r,
        use_rslora=False,
        rank_pattern=lower,
        alpha_pattern=dict(lower),
        target_modules="|".join(re.escape(name) for name in ranks),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def highest_rank(model: nn.Module, adapters: list[str]) -> int | None:
    """The largest rank that one of the adapters has in a layer; `None` if there is none."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    return max((layer.r[a] for layer in layers for a in adapters if a in layer.r), default=None)


def plain_config(config: Any) -> LoraConfig:
    """What LoRA knows of a config."""
    fields = LoraConfig.__dataclass_fields__.values()
    return LoraConfig(**{f.name: getattr(config, f.name) for f in fields if f.init})


def _rank(name: str, having: list[int], kind: str, largest: int) -> int:
    if kind == "cat":
        return sum(having)
    if kind not in _KEEPS_RANKS:
        return largest
    if len(set(having)) > 1:
        raise ConfigError(
            f"combination_type={kind!r} adds factors, which must have equal ranks, but in {name} "
            f"the adapters have the ranks {having}; use combination_type='cat' or 'svd'."
        )
    return having[0]
