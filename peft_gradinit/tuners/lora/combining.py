"""Weighted combinations of adapters into a plain LoRA with ranks by layer."""

import re

from peft import LoraConfig
from torch import nn

from ...errors import ConfigError
from ...records import unscaled
from .pairs import adapted_layers

_KEEPS_RANKS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")


def combined_config(
    model: nn.Module, adapters: list[str], kind: str, proposed: LoraConfig
) -> LoraConfig:
    """The config of a combination of scaling 1: all layers that one of the adapters has.

    PEFT's `proposed` config has the first adapter's exclusions but not its patterns, which does not
    fit layers of different ranks. `kind` is PEFT's `combination_type`.
    """
    ranks: dict[str, int] = {}
    for adapter in adapters:
        for name, layer in adapted_layers(model, adapter):
            combined = [layer.r[other] for other in adapters if other in layer.r]
            largest = min(proposed.r, layer.in_features, layer.out_features)
            ranks[name] = _rank(name, combined, kind, largest)
    return unscaled(
        proposed,
        ranks or {"": proposed.r},
        target_modules="|".join(re.escape(name) for name in ranks),
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
    )


def highest_rank(model: nn.Module, adapters: list[str]) -> int | None:
    """The largest rank of a layer in one of the adapters; `None` if they have no layers."""
    ranks = (layer.r[a] for a in adapters for _, layer in adapted_layers(model, a))
    return max(ranks, default=None)


def _rank(name: str, combined: list[int], kind: str, largest: int) -> int:
    if kind == "cat":
        return sum(combined)
    if kind not in _KEEPS_RANKS:
        return largest
    if len(set(combined)) > 1:
        raise ConfigError(
            f"combination_type={kind!r} adds factors, which must have equal ranks, but in {name} "
            f"the adapters have the ranks {combined}; use combination_type='cat' or 'svd'."
        )
    return combined[0]
