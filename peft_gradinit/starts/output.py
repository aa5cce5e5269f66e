"""A config that also adapts the output layer of a language model, for as many trained numbers."""

import copy
import re
from typing import TypeVar

from peft import LoraConfig, PeftModel
from torch import nn

from ..errors import ConfigError
from ..layouts import uncompiled
from ..records import alpha_growth, rank_of
from .base import is_trained_in_full
from .options import is_automatic
from .targets import adapted_by_peft, output_layer, targets_of, with_converted_targets

MOST_TIMES_R = 4
"""The output layer gets at most so many times `r` ranks, as with `target_modules="auto+output"`."""
ConfigT = TypeVar("ConfigT", bound=LoraConfig)


def with_output_layer(model: nn.Module, config: ConfigT) -> ConfigT:
    """A copy of a config that also adapts the model's output layer, and trains no more numbers.

    All other layers give up a rank (or as few as are needed), and the output layer gets as many
    ranks as that pays for, at most `4 r`. The scaling of every layer stays as it was, so a learning
    rate stays good. In our benchmarks of language models on prose, plain LoRA with its output layer ends
    lower than without, by 0.5 to 1.9 %; on short answers the gain is not certain (`docs/benchmarks/`).

        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        model = get_peft_model(model, with_output_layer(model, config))

    An output layer that is tied to the embedding gets an adapter of its own; the embedding stays.
    Then PEFT warns, since merging would change the embedding as well. PEFT saves the whole weight
    beside the adapter, unless `save_pretrained(…, save_embedding_layers=False)`.

    Args:
        model: a model with an output layer; of a `PeftModel`, its base.
        config: PEFT's `LoraConfig`, or one of this package with ranks that are alike.

    Returns:
        A config of the same type. `target_modules` are names.

    Raises:
        ConfigError: if the config is of another type, the model has no linear output layer, the config
            adapts it already, excludes it or gives it to `modules_to_save`, ranks differ by layer or are
            chosen by a calibration, or no rank is left for the other layers.
    """
    _check(config)
    model = uncompiled(model)
    model = model.get_base_model() if isinstance(model, PeftModel) else model
    found = output_layer(model)
    if not found:
        raise ConfigError(
            f"{type(model).__name__} has no linear output layer (get_output_embeddings()); use the "
            "config as it is."
        )
    ((name, shape),) = found.items()
    if is_trained_in_full(name, config):
        raise ConfigError(f"{name} is in modules_to_save, which trains it whole; take it out.")
    config = with_converted_targets(config, model)
    adapted = adapted_by_peft(model, config)
    if name in adapted:
        raise ConfigError(f"target_modules name {name} already; use the config as it is.")
    freed = _numbers(adapted, config) // config.r
    once = shape[0] * (config.use_dora + config.lora_bias)  # whatever the rank
    given = next((k for k in range(1, config.r) if k * freed >= once + sum(shape)), None)
    if given is None:
        raise ConfigError(
            f"an adapter of {name} trains at least {once + sum(shape):,} numbers, and r={config.r} of the other layers "
            f"cannot pay for it: a rank of them trains {freed:,}; raise r, or name more layers."
        )
    own = min(MOST_TIMES_R * config.r, (given * freed - once) // sum(shape))
    changed = _changed(config, adapted, name, config.r - given, own)
    now = adapted_by_peft(model, changed)
    if now.keys() > {*adapted, name}:  # in a list, "lm_head" names "draft.lm_head" as well
        changed.target_modules = "|".join(map(re.escape, sorted(changed.target_modules or ())))
    if name not in now:
        raise ConfigError(
            f"exclude_modules={config.exclude_modules!r} keeps {name} without an adapter; take it out "
            "there, or use the config as it is."
        )
    return changed


def _check(config: LoraConfig) -> None:
    if not isinstance(config, LoraConfig):
        raise ConfigError(
            "with_output_layer(model, config) expects a LoraConfig, or a config of this package that has ranks, "
            f"got {type(config).__name__}."
        )
    allocation = getattr(config, "rank_allocation", "uniform")
    if is_automatic(config.target_modules) or allocation != "uniform":
        raise ConfigError(
            "a calibration chooses the ranks of this config; use target_modules='auto+output' in "
            "place of with_output_layer."
        )
    if config.rank_pattern or config.alpha_pattern:
        raise ConfigError(
            "with_output_layer shares out ranks that are alike, but the config has a rank_pattern or "
            "an alpha_pattern; add the output layer to target_modules and to the patterns."
        )


def _numbers(adapted: dict[str, tuple[nn.Module, str | None]], config: LoraConfig) -> int:
    """Numbers in the factors of all layers; layers that are not linear are not counted."""
    ranks, numbers = (1, 1, 1.0), 0
    for name, (module, parameter) in adapted.items():
        targets = targets_of(name, module, parameter, lambda _: ranks, lambda _: True).values()
        shapes = [target.shape for target in targets if target.shape is not None]
        numbers += rank_of(config, name) * sum(map(sum, shapes))
    return numbers


def _changed(
    config: ConfigT,
    adapted: dict[str, tuple[nn.Module, str | None]],
    name: str,
    r: int,
    own: int,
) -> ConfigT:
    """The config with rank `r`, and `own` ranks for the output layer, at the old scaling."""

    def growth(rank: int) -> float:
        return alpha_growth(rank / config.r, use_rslora=config.use_rslora)

    alpha = config.lora_alpha
    changed = copy.copy(config)
    modules = {n for n, (_, parameter) in adapted.items() if parameter is None}
    changed.target_modules = sorted({*modules, name})
    changed.r, changed.lora_alpha = r, alpha * growth(r)  # pyright: ignore[reportAttributeAccessIssue] PEFT takes floats
    # Patterns are those of PEFT's conversion: experts that were two layers have twice the rank.
    of_ranks, of_alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    changed.rank_pattern = {n: rank * r // config.r for n, rank in of_ranks.items()} | {name: own}
    changed.alpha_pattern = {n: of * growth(r) for n, of in of_alphas.items()}
    changed.alpha_pattern[name] = alpha * growth(own)
    return changed
