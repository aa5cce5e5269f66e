"""Adapters on parameters that have no layer of their own: PEFT's `target_parameters`.

PEFT wraps the module that holds the parameter, once for each parameter, and keeps the factors of all
experts in one pair: `lora_A (experts * r, in)`, expert by expert, and `lora_B (out, r * experts)`,
in which the experts of one rank stand side by side. Here every expert is a target with a start of
its own, under a name such as `model.layers.0.mlp.experts.gate_up_proj[3]`.
"""

import copy
import warnings
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftType
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn

from ..calibration import ExpertWeight, unwrapped
from ..errors import ConfigError, TargetError

if TYPE_CHECKING:
    from .config import GradInitConfig

_UNUSABLE_OPTIONS = ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora")
"""Options that PEFT's wrapper of parameters refuses."""

Factors = tuple[Tensor, Tensor]


def with_converted_targets(config: "GradInitConfig", model: nn.Module) -> "GradInitConfig":
    """A copy of a config with the targets that a plain `LoraConfig` would get from PEFT.

    For models whose experts were linear layers in Transformers 4, PEFT turns `target_modules` that
    name them (and `"all-linear"`) into `target_parameters`. The saved adapter is plain LoRA and will
    be read so; the live one must agree.

    Args:
        config: not changed.
        model: the base model.

    Returns:
        The copy; its patterns may have changed as well.
    """
    config = copy.copy(config)
    if config.target_modules is None:
        return config
    config.rank_pattern = dict(config.rank_pattern or {})
    config.alpha_pattern = dict(config.alpha_pattern or {})
    kind, config.peft_type = config.peft_type, PeftType.LORA
    convert_peft_config_for_transformers(config, model, None)
    config.peft_type = kind
    return config


def check_parameter_options(config: "GradInitConfig", names: list[str]) -> None:
    """Refuse, before any data are read, what PEFT would refuse afterwards.

    Args:
        config: the config to inject.
        names: of the targeted parameters.

    Raises:
        ConfigError: naming the option.
    """
    for option in _UNUSABLE_OPTIONS:
        if names and (value := getattr(config, option, None)):
            raise ConfigError(
                f"{option}={value!r} does not work on parameters, but {names[0]} is targeted; leave "
                f"{option} out, or target layers only (target_modules=['q_proj', …])."
            )


@contextmanager
def matched_patterns(config: "GradInitConfig", names: Collection[str]) -> Iterator[None]:
    """Keep PEFT from warning of patterns that match parameters; it looks for modules alone.

    Args:
        config: with the patterns.
        names: of all adapted modules and parameters.
    """
    patterns = {**(config.rank_pattern or {}), **(config.alpha_pattern or {})}
    all_match = all(any(get_pattern_key([p], name) == p for name in names) for p in patterns)
    with warnings.catch_warnings():
        if all_match:
            warnings.filterwarnings("ignore", r"The following \w+_pattern keys did not match")
        yield


def expert_weights(name: str, module: nn.Module, parameter: str) -> dict[str, ExpertWeight]:
    """The matrices of a parameter as PEFT divides it.

    Args:
        name: full name of the parameter.
        module: the base module that holds it.
        parameter: its name there.

    Returns:
        Matrices by name: `name` itself for a parameter of two dimensions, else `name[0]`, ….

    Raises:
        TargetError: if the parameter is no stack of matrices of floating numbers.
    """
    tensor = getattr(module, parameter)
    if tensor.dim() not in (2, 3) or not tensor.is_floating_point():
        raise TargetError(
            f"{name} is {tensor.dtype} of shape {tuple(tensor.shape)}; target_parameters takes "
            "floating parameters (out, in) and (experts, out, in). Leave it out."
        )
    if tensor.dim() == 2:
        return {name: ExpertWeight(module, parameter, None, transposed=False)}
    transposed = bool(getattr(module, "is_transposed", False))
    return {
        f"{name}[{i}]": ExpertWeight(module, parameter, i, transposed)
        for i in range(tensor.shape[0])
    }


def expert_matrix(weight: ExpertWeight) -> Tensor:
    """The matrix as PEFT adapts it, `(out, in)`, float32."""
    tensor = getattr(weight.module, weight.parameter).detach()
    matrix = tensor if weight.index is None else tensor[weight.index]
    return (matrix.T if weight.transposed else matrix).float()


def expert_shape(weight: ExpertWeight) -> tuple[int, int]:
    """`(out, in)` of the matrix as PEFT adapts it."""
    first, second = getattr(weight.module, weight.parameter).shape[-2:]
    return (second, first) if weight.transposed else (first, second)


def adapted_parameter(path: str, layer: nn.Module) -> str:
    """Full name of what a LoRA layer adapts: the parameter of a wrapper, else the module.

    Args:
        path: of the layer in the model.
        layer: the layer.
    """
    if not isinstance(layer, ParamWrapper):
        return path
    return f"{path.replace('.base_layer', '')}.{layer.parameter_name}"


def find_layer(model: nn.Module, name: str) -> LoraLayer:
    """The LoRA layer of a module, or of a parameter, by the full name of that.

    Args:
        model: the base model with adapters in it.
        name: of the module or parameter.

    Returns:
        The layer; of wrappers around each other, the one of the parameter.

    Raises:
        TypeError: if there is none.
    """
    path, _, parameter = name.rpartition(".")
    wrapper = unwrapped(model.get_submodule(path))
    while isinstance(wrapper, ParamWrapper):
        if wrapper.parameter_name == parameter:
            return wrapper
        wrapper = wrapper.base_layer
    layer = unwrapped(model.get_submodule(name))
    if not isinstance(layer, LoraLayer):
        raise TypeError(f"{name} is a {type(layer).__name__}, expected a LoRA layer")
    return layer


def n_experts(layer: Any) -> int:
    """How many matrices the factors of a LoRA layer are for."""
    return layer.num_experts if isinstance(layer, ParamWrapper) else 1


def stacked(factors: Mapping[int, Factors], plain: Factors, n: int) -> Factors:
    """Put the starts of a parameter's experts into PEFT's layout.

    Args:
        factors: `A0 (r, in)` and `B0 (out, r)` by expert; experts without a start are absent.
        plain: what the layer has, in PEFT's layout; experts without a start keep its `A` and get
            `B = 0`.
        n: number of experts.

    Returns:
        `A0 (n * r, in)` and `B0 (out, r * n)`.
    """
    A = plain[0].detach().float().unflatten(0, (n, -1)).clone()
    B = torch.zeros_like(plain[1], dtype=torch.float32).unflatten(1, (-1, n))
    for expert, (A0, B0) in factors.items():
        A[expert], B[:, :, expert] = A0, B0
    return A.flatten(0, 1), B.flatten(1, 2)


def mean_scores(scores: list[Tensor]) -> Tensor:
    """What each rank of a parameter brings, from what it brings to its experts: the mean."""
    return torch.stack([s.double().cpu() for s in scores]).mean(dim=0)
