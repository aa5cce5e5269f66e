"""The LoRA file as PEFT reads it: keys, ranks, scalings, patterns. No other module knows them."""

import math
import re
from collections.abc import Collection, Mapping
from typing import Any

from peft import LoraConfig
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor

from ..layouts import plain_name
from ..linalg import Factors

PREFIX = "base_model.model."
"""Beginning of the keys in a file that was saved from a `PeftModel`."""

A_KEY, B_KEY = ".lora_A.weight", ".lora_B.weight"
B_BIAS_KEY = ".lora_B.bias"
"""Ends of the keys of a linear layer's factors."""

OUT_OF_ATTENTION = ".base_layer.out_proj"
"""End of the name of a layer inside `torch.nn.MultiheadAttention`, adapted along with it by PEFT."""


_LEAVE_BASE = (True, False, "gaussian", "orthogonal", "eva", "mica")
"""Values of `init_lora_weights` with which PEFT leaves the base weights as they are."""


def overwrites_base(config: LoraConfig) -> bool:
    """Whether a start of PEFT wrote into the base, so that the factors are no update of the original."""
    return config.init_lora_weights not in _LEAVE_BASE


def plain_config(config: Any, **changes: Any) -> LoraConfig:
    """A new `LoraConfig` with the options that `config` shares with it, apart from `changes`."""
    names = [f.name for f in LoraConfig.__dataclass_fields__.values() if f.init]
    values = {name: getattr(config, name) for name in names if hasattr(config, name)}
    return LoraConfig(**{**values, "peft_type": None, **changes})


def rank_of(config: LoraConfig, name: str) -> int:
    """The rank that a config gives a layer, by its name in the base model."""
    return _from_patterns(config.rank_pattern, name, config.r)


def alpha_of(config: LoraConfig, name: str) -> float:
    """The `lora_alpha` that a config gives a layer, by its name in the base model."""
    return _from_patterns(config.alpha_pattern, name, config.lora_alpha)


def scaling(alpha: float, r: int, *, use_rslora: bool) -> float:
    """The factor of the product `B A`: `alpha / r`, with rsLoRA `alpha / sqrt(r)`."""
    return alpha / (math.sqrt(r) if use_rslora else r)


def alpha_growth(times: float, *, use_rslora: bool) -> float:
    """Factor for `lora_alpha` when the rank is multiplied by `times`, so that the scaling stays."""
    return math.sqrt(times) if use_rslora else times


def patterns(values: Mapping[str, Any], default: Any) -> dict[str, Any]:
    """A `rank_pattern` or `alpha_pattern` that gives every layer its value, by name in the base.

    Each key matches one layer; layers of the default value have none.
    """
    return {_key(n, values): value for n, value in values.items() if value != default}


def doubled(plain: LoraConfig) -> LoraConfig:
    """Double every rank of a config in place and keep every scaling."""
    growth = alpha_growth(2, use_rslora=plain.use_rslora)
    plain.r = 2 * plain.r
    plain.lora_alpha = growth * plain.lora_alpha  # pyright: ignore[reportAttributeAccessIssue]
    plain.rank_pattern = {k: 2 * v for k, v in (plain.rank_pattern or {}).items()}
    plain.alpha_pattern = {k: growth * v for k, v in (plain.alpha_pattern or {}).items()}
    return plain


def unscaled(config: Any, ranks: Mapping[str, int], **changes: Any) -> LoraConfig:
    """The config of a file whose factors hold the scaling: scaling 1 in every layer.

    `lora_alpha` equals `r` and `use_rslora` is off, so that readers which ignore `alpha_pattern`
    compute the same. Other options are those of `config`, apart from `changes`.
    """
    r = max(ranks.values())
    ranks = patterns(ranks, r)
    of_starts = dict.fromkeys(("lora_ga_config", "corda_config", "eva_config"))
    own = {"r": r, "lora_alpha": r, "use_rslora": False, "init_lora_weights": True, **of_starts}
    return plain_config(
        config, **own, rank_pattern=dict(ranks), alpha_pattern=dict(ranks), **changes
    )


def linear_layers(
    state_dict: Mapping[str, Tensor], config: LoraConfig
) -> tuple[dict[str, Factors], dict[str, Tensor]]:
    """Split the entries of a saved adapter into factors of linear layers and all other entries.

    The factors are float32, by name in the base model, with the scaling of `config` inside `B`, and
    inside its bias among the other entries, if there is one.

    Raises:
        ValueError: if a factor is missing or has another rank than `config` says.
    """
    layers, others = {}, dict(state_dict)
    for key in [k for k in state_dict if k.endswith(A_KEY) and state_dict[k].dim() == 2]:
        stem = key.removesuffix(A_KEY)
        name = stem.removeprefix(PREFIX)
        layer = name.removesuffix(OUT_OF_ATTENTION)
        if _is_of_parameter(name, config):
            continue
        A, B = others.pop(key), others.pop(stem + B_KEY, None)
        if B is None or B.dim() != 2 or B.shape[1] != A.shape[0]:
            got = None if B is None else tuple(B.shape)
            raise ValueError(
                f"{name} has lora_A of shape {tuple(A.shape)} and lora_B of shape {got}"
            )
        if A.shape[0] != (r := rank_of(config, layer)):
            raise ValueError(
                f"{name} has rank {A.shape[0]} in the weights and {r} in adapter_config.json"
            )
        scale = scaling(alpha_of(config, layer), r, use_rslora=config.use_rslora)
        layers[name] = Factors(A.float(), scale * B.float())
        if (bias := others.get(stem + B_BIAS_KEY)) is not None:
            others[stem + B_BIAS_KEY] = (scale * bias.float()).to(bias.dtype)
    return layers, others


def entries(layers: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The entries of a file for the factors of layers, given by name in the base model."""
    return {
        f"{PREFIX}{name}{side}": factor.contiguous().clone()
        for name, factors in layers.items()
        for side, factor in ((A_KEY, factors.A), (B_KEY, factors.B))
    }


def name_in_file(name: str, *, prefixed: bool) -> str:
    """A module's name in the keys of a file; `prefixed` if it was saved from a `PeftModel`."""
    plain = name.removeprefix(PREFIX)
    return PREFIX + plain if prefixed else plain


def is_prefixed(keys: Collection[str]) -> bool:
    """Whether a file with these keys was saved from a `PeftModel`."""
    return any(plain_name(key).startswith(PREFIX) for key in keys)


def _from_patterns(values: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    values = values or {}
    return values.get(get_pattern_key(list(values), name), default)


def depends_on_order(pattern: Mapping[str, Any] | None, names: Collection[str]) -> bool:
    """Whether some layer's value changes when the keys are sorted, as files have them: PEFT takes the first match."""
    in_file = dict(sorted((pattern or {}).items()))
    return any(_from_patterns(pattern, n, None) != _from_patterns(in_file, n, None) for n in names)


def _key(name: str, names: Collection[str]) -> str:
    """A key that matches `name` and no other; without `^`, unknown to PEFT < 0.15, if possible."""
    others = (other for other in names if other != name)
    plain = re.fullmatch(r"[\w.]+", name)
    if plain and not any(re.fullmatch(rf"(.*\.)?{name}", other) for other in others):
        return name
    return f"^{re.escape(name)}"


def _is_of_parameter(layer: str, config: LoraConfig) -> bool:
    """Whether factors belong to one of `target_parameters`: one pair for all experts together."""
    holder = layer.replace(".base_layer", "")  # one wrapper for each parameter of a module
    holders = {name.rpartition(".")[0] for name in config.target_parameters or ()}
    if any(of and f".{holder}".endswith(f".{of}") for of in holders):
        return True
    # A name without a module is that of parameters of any module but the layers that are targets.
    is_target = config.target_modules and check_target_module_exists(config, holder)
    return "" in holders and not is_target
