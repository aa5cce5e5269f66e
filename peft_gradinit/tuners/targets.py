"""Which modules a config targets, of what kind they are, and what rank each can have."""

import copy
import dataclasses
import re
import warnings
from collections.abc import Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from ..calibration import ExpertWeight, Measurable, is_offloaded, plain_name
from ..errors import TargetError
from .parameters import (
    adapted_parameter,
    check_parameter_options,
    expert_matrix,
    expert_shape,
    expert_weights,
)
from .weights import LINEAR_KINDS, linear_shape, linear_weight

if TYPE_CHECKING:
    from .config import GradInitConfig


@dataclasses.dataclass(frozen=True)
class Target:
    """One targeted module, or one expert of a targeted parameter.

    Attributes:
        name: full name in the base model; of an expert, the parameter's name and `[index]`.
        module: the base layer itself, without adapters around it.
        shape: `(out, in)` of its weight in the layout of `nn.Linear`; `None` for kinds of layers
            that have no such weight.
        r: rank of its adapter.
        requested_r: rank that the config asked for.
        alpha: its `lora_alpha`, adjusted so that a lowered rank leaves the scaling as it was.
        expert: which matrix of the parameter; `None` for layers.
    """

    name: str
    module: nn.Module
    shape: tuple[int, int] | None
    r: int
    requested_r: int
    alpha: float
    expert: ExpertWeight | None = None

    def weight(self) -> Tensor:
        """The weight in the layout of `nn.Linear`, dequantised if need be, float32."""
        return linear_weight(self.module) if self.expert is None else expert_matrix(self.expert)

    @property
    def adapted(self) -> str:
        """Full name of what the adapter is on: the module, or the parameter of all experts."""
        single = self.expert is None or self.expert.index is None
        return self.name if single else self.name.rpartition("[")[0]

    @property
    def measurable(self) -> Measurable:
        """What a calibration pass measures."""
        return self.module if self.expert is None else self.expert


def resolve_targets(
    model: nn.Module, config: "GradInitConfig", others: Mapping[str, Any] | None = None
) -> dict[str, Target]:
    """Find the targets exactly as PEFT's injection would, without changing the model.

    Args:
        model: the base model, with or without adapters of other names.
        config: the config to inject; not changed.
        others: configs of those adapters, so that PEFT can refuse a combination.

    Returns:
        Targets by full name, with ranks lowered where the method needs more singular triplets than
        the layer has.

    Raises:
        TargetError: if a layer is too narrow for any rank, or is of a kind that the method cannot
            serve while `uncalibrated="error"`.
        ConfigError: if an option does not work on parameters.
    """
    recorder = _TargetRecorder(model, copy.deepcopy(config), others or {})
    found = recorder.record()
    check_parameter_options(config, [name for name, (_, parameter) in found.items() if parameter])
    targets = {}
    for name, (module, parameter) in found.items():
        targets |= _targets(name, module, parameter, config)
    _check_kinds(targets, config)
    _check_loaded_for_dora(targets, config)
    return targets


def live_targets(
    model: nn.Module, config: "GradInitConfig", adapter_name: str
) -> dict[str, Target]:
    """The targets of an adapter that is injected already."""
    targets = {}
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and adapter_name in module.scaling:
            layer = cast("nn.Module", module)
            name = adapted_parameter(plain_name(path), layer)
            requested = config.requested_ranks.get(name)
            parameter = getattr(layer, "parameter_name", None)
            for target in _targets(name, layer, parameter, config).values():
                targets[target.name] = dataclasses.replace(
                    target, requested_r=requested or target.requested_r
                )
    return targets


def write_patterns(targets: Mapping[str, Target], config: "GradInitConfig") -> None:
    """Record changed ranks in `rank_pattern` and `alpha_pattern`, under anchored full names.

    Args:
        targets: all targets.
        config: gets new pattern dicts, which say for every target what the old ones said or what
            has changed; the old ones are not changed. Remembers what was asked for.
    """
    lowered = [t for t in targets.values() if t.r and t.r != t.requested_r]
    if not lowered:
        return
    config.requested_ranks = {t.adapted: t.requested_r for t in lowered}
    # All targets and no other pattern: PEFT takes the first that matches, and sorts them on saving.
    adapted = {f"^{re.escape(t.adapted)}": t for t in targets.values() if t.r}
    config.rank_pattern = {k: t.r for k, t in adapted.items() if t.r != config.r}
    config.alpha_pattern = {k: t.alpha for k, t in adapted.items() if t.alpha != config.lora_alpha}
    if config.allocates_ranks:
        return
    ranks = {t.adapted: f"{t.adapted} ({t.r} of {t.requested_r})" for t in lowered}
    warnings.warn(
        f"{config.method} needs {config.n_triplets(config.r)} singular directions for r={config.r}; "
        f"these layers have fewer and get a lower rank at the same scaling: "
        f"{', '.join(ranks.values())}.",
        stacklevel=2,
    )


def _targets(
    name: str, module: nn.Module, parameter: str | None, config: "GradInitConfig"
) -> dict[str, Target]:
    """The target that a module is, or those that the matrices of its parameter are."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    if parameter is None:
        return {name: _target(name, base, linear_shape(base), config)}
    weights = expert_weights(name, base, parameter)
    one = _target(name, base, expert_shape(next(iter(weights.values()))), config)
    return {key: dataclasses.replace(one, name=key, expert=w) for key, w in weights.items()}


def _target(
    name: str, base: nn.Module, shape: tuple[int, int] | None, config: "GradInitConfig"
) -> Target:
    ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
    requested = ranks.get(get_pattern_key(list(ranks), name), config.r)
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    r = requested if shape is None else min(requested, config.rank_limit(shape))
    if r < 1:
        raise TargetError(
            f"{config.method} with r={requested} cannot start {name}: its weight is {shape}, and "
            f"even rank 1 needs {config.n_triplets(1)} singular directions; add it to "
            "exclude_modules, or take it out of target_parameters."
        )
    if r != requested:
        alpha *= config.same_scaling(r / requested)
    return Target(name, base, shape, r, requested, alpha)


def _check_kinds(targets: Mapping[str, Target], config: "GradInitConfig") -> None:
    others = {n: type(t.module).__name__ for n, t in targets.items() if t.shape is None}
    if others and config.uncalibrated == "error":
        raise TargetError(
            f"{config.method} starts linear layers ({LINEAR_KINDS}), but target_modules also matches "
            f"{others}; exclude them, or set uncalibrated='lora' to give them a plain LoRA start."
        )


def _check_loaded_for_dora(targets: Mapping[str, Target], config: "GradInitConfig") -> None:
    offloaded = [name for name, target in targets.items() if is_offloaded(target.module)]
    if config.use_dora and offloaded:
        raise TargetError(
            f"use_dora=True reads the base weight outside of its layer's forward, where that of "
            f"{len(offloaded)} targets ({offloaded[0]}, …) is offloaded; set use_dora=False, or keep "
            "them on the device in device_map."
        )


_RECORDED = "gradinit_recorded"
"""Name of the adapter whose injection is recorded; no user's adapter has it."""


class _Recorded(Exception):  # noqa: N818 control flow, not an error
    """Ends the injection before it changes anything."""


class _TargetRecorder(LoraModel):
    """Lets PEFT's own `inject_adapter` choose the modules, and writes them down instead.

    This way `all-linear`, regular expressions, `exclude_modules`, `layers_to_transform` and what
    later versions of PEFT add mean here what they mean there.
    """

    def __init__(
        self, model: nn.Module, config: "GradInitConfig", others: Mapping[str, Any]
    ) -> None:
        nn.Module.__init__(self)
        self.model = model
        self.peft_config = {**others, _RECORDED: config}
        self.active_adapter = _RECORDED
        self.targeted_module_names = []
        self.targeted_parameter_names = []
        self._found: dict[str, tuple[nn.Module, str | None]] = {}

    def record(self) -> dict[str, tuple[nn.Module, str | None]]:
        """Return what an injection would adapt, by name: modules, or one of their parameters."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the injection proper repeats them
            with suppress(_Recorded):
                LoraModel.inject_adapter(self, self.model, _RECORDED)
        return self._found

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        _, _, target, _, _ = args[:5]
        self._found[kwargs["current_key"]] = (target, kwargs.get("parameter_name"))

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise _Recorded


def frobenius_of_product(B: Tensor, A: Tensor) -> float:
    """`|B A|_F` from the two `r x r` Gram matrices."""
    gram = (B.double().T @ B.double()) * (A.double() @ A.double().T)
    return torch.sqrt(gram.sum().clamp_min(0)).item()
