"""Modules and parameters that a config targets, their kinds, and the ranks that they can have."""

import copy
import warnings
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, TypeVar

from peft import LoraConfig, PeftType
from peft.tuners.lora import LoraModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import get_pattern_key
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn

from ..errors import ConfigError, TargetError, warn
from ..layouts import is_offloaded
from ..records import alpha_growth, alpha_of, depends_on_order, patterns, rank_of, targets_asked
from .base import check_no_head, ends_as_head, is_trained_in_full
from .config import GradInitConfig
from .experts import expert_shape, expert_weights
from .options import AUTO_WITH_OUTPUT, is_automatic
from .target import Target
from .weights import LINEAR_KINDS, linear_shape

ConfigT = TypeVar("ConfigT", bound=LoraConfig)
_UNUSABLE_OPTIONS = ("lora_dropout", "fan_in_fan_out", "lora_bias", "use_dora")
"""Options that PEFT's wrapper of parameters refuses."""


def with_converted_targets(config: ConfigT, model: nn.Module) -> ConfigT:
    """A copy of a config with the targets that a plain `LoraConfig` would get from PEFT.

    Experts of some models were linear layers in Transformers 4. PEFT turns `target_modules` that
    name them (and `"all-linear"`) into `target_parameters`, and changes patterns to match. It will
    do so for the saved adapter, which is plain LoRA, and the live one must agree.
    """
    config = copy.copy(config)
    config.target_modules = asked = targets_asked(config, model)
    if is_automatic(asked):
        config.target_modules = "all-linear"
    if config.target_modules is None:
        return config
    config.rank_pattern = dict(config.rank_pattern or {})
    config.alpha_pattern = dict(config.alpha_pattern or {})
    kind, config.peft_type = config.peft_type, PeftType.LORA
    convert_peft_config_for_transformers(config, model, None)
    config.peft_type = kind
    if asked == AUTO_WITH_OUTPUT:
        _add_output(config, model)
    return config


def _add_output(config: LoraConfig, model: nn.Module) -> None:
    """Add the output layer to `"all-linear"`, which is replaced by PEFT's names for it."""
    recorder = _TargetRecorder(model, copy.deepcopy(config), {})
    recorder.record()
    all_linear: Any = recorder.peft_config[_RECORDED].target_modules
    added = {name for name in output_layer(model) if not is_trained_in_full(name, config)}
    names_of_all: Any = added.union(all_linear)  # PEFT makes a set of a list
    config.target_modules = names_of_all
    vars(config)["added"] = frozenset(added)


def output_layer(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Shape `(out, in)` of a language model's output layer by its name; empty if there is none."""
    output = getattr(model, "get_output_embeddings", lambda: None)()
    shape = None if output is None else linear_shape(_base_of(output))
    names = [name for name, module in model.named_modules() if module is output]
    return {} if shape is None else dict.fromkeys(names[:1], shape)


def _base_of(module: Any) -> nn.Module:
    return module.get_base_layer() if isinstance(module, BaseTunerLayer) else module


def _check_parameter_options(config: GradInitConfig, names: list[str]) -> None:
    """Refuse, before any data are read, options that PEFT refuses on parameters after that."""
    for option in _UNUSABLE_OPTIONS:
        if names and (value := getattr(config, option, None)):
            raise ConfigError(
                f"{option}={value!r} does not work on parameters, but {names[0]} is targeted; "
                f"leave {option} out, or target layers only (target_modules=['q_proj', …])."
            )


@contextmanager
def matched_patterns(config: GradInitConfig, names: Collection[str]) -> Iterator[None]:
    """Silence PEFT's warning of unmatched patterns if each matches one of `names`.

    PEFT tries patterns on names of modules only, and here they may match parameters.
    """
    keys = {**(config.rank_pattern or {}), **(config.alpha_pattern or {})}
    all_match = all(any(get_pattern_key([key], name) == key for name in names) for key in keys)
    with warnings.catch_warnings():
        if all_match:
            warnings.filterwarnings("ignore", r"The following \w+_pattern keys did not match")
        yield


def resolve_targets(
    model: nn.Module,
    config: GradInitConfig,
    others: Mapping[str, Any] | None = None,
    state_dict: dict[str, Tensor] | None = None,
) -> dict[str, Target]:
    """Find the targets, by full name, exactly as PEFT's injection would, without the injection.

    Ranks are lowered where the method needs more singular triplets than the layer has. `others` are
    the configs of the model's other adapters, so that PEFT can refuse a combination. A `state_dict`
    of an adapter names the layers in place of the config.
    """
    recorded = _TargetRecorder(model, copy.deepcopy(config), others or {}).record(state_dict)
    _check_parameter_options(config, [name for name, (_, param) in recorded.items() if param])
    if not config.automatic:
        for name in (name for name, (_, param) in recorded.items() if not param):
            check_no_head(name, config)
    targets = {}
    for name, (module, parameter) in recorded.items():
        ranks = partial(_ranks, name, config=config)
        can_start = partial(_can_start, name, config=config)
        targets |= targets_of(name, module, parameter, ranks, can_start)
    _check_kinds(targets, config)
    _check_loaded_for_dora(targets, config)
    if not config.needs().reads_data:  # others find by the data what never runs
        warn_of_idle(model, targets)
    return targets


def warn_of_idle(model: nn.Module, names: Iterable[str]) -> None:
    """Warn of targets whose layers never run, so that their adapters would never train.

    Args:
        model: the base model.
        names: of the targets.
    """
    modules = dict(model.named_modules())
    idle = [
        n for n in names if isinstance(modules.get(n.rpartition(".")[0]), nn.MultiheadAttention)
    ]
    if idle:
        warn(
            f"torch.nn.MultiheadAttention reads the weight of {idle[0]} itself and never runs the "
            f"layer, so {len(idle)} such adapters will not train; add 'out_proj' to exclude_modules."
        )


def adapted_by_peft(
    model: nn.Module, config: LoraConfig
) -> dict[str, tuple[nn.Module, str | None]]:
    """What PEFT adapts for a config, by name: the module, and the name of a parameter or `None`."""
    return _TargetRecorder(model, copy.deepcopy(config), {}).record()


def write_patterns(targets: Mapping[str, Target], config: GradInitConfig) -> dict[str, int]:
    """Write new patterns into `config` if a rank has changed, or if files would change what they mean.

    The old dicts stay as they are.

    Returns:
        The rank that was asked for, by name of the module or parameter, where it has changed.
    """
    lowered = [t for t in targets.values() if t.r and t.r != t.requested_r]
    adapted = {t.adapted: t for t in targets.values() if t.r}
    of_config = (config.rank_pattern, config.alpha_pattern)
    if not lowered and not any(depends_on_order(pattern, adapted) for pattern in of_config):
        return {}
    # One pattern for each target and no other: PEFT takes the first match, and sorts on saving.
    config.rank_pattern = patterns({n: t.r for n, t in adapted.items()}, config.r)
    config.alpha_pattern = patterns({n: t.alpha for n, t in adapted.items()}, config.lora_alpha)
    if lowered and not config.allocates_ranks:
        ranks = {t.adapted: f"{t.adapted} ({t.r} of {t.requested_r})" for t in lowered}
        warn(
            f"{config.method} needs {max(config.r, config.needs().size(config.r))} singular "
            f"directions for r={config.r}; these layers have fewer and get a lower rank at the "
            f"same scaling: {', '.join(ranks.values())}."
        )
    return {t.adapted: t.requested_r for t in lowered}


def targets_of(
    name: str,
    module: nn.Module,
    parameter: str | None,
    ranks: Callable[[tuple[int, int] | None], tuple[int, int, float]],
    can_start: Callable[[tuple[int, int]], bool],
) -> dict[str, Target]:
    """The target for a module, or those for the matrices of its `parameter`, by name.

    `ranks` gives the rank, the rank asked for and `lora_alpha` for a weight of shape `(out, in)`.
    `can_start` says whether a layer of such a weight gets the method's start; others start plain.
    """
    base = _base_of(module)
    if parameter is None:
        shape = linear_shape(base)
        shape = shape if shape and can_start(shape) else None
        return {name: Target(name, base, shape, *ranks(shape))}
    weights = expert_weights(name, base, parameter)
    shape = expert_shape(next(iter(weights.values())))
    of_all = ranks(shape)
    return {key: Target(key, base, shape, *of_all, expert=w) for key, w in weights.items()}


def _can_start(name: str, shape: tuple[int, int], config: GradInitConfig) -> bool:
    if config.automatic and ends_as_head(name, config):
        return False
    has_choice = config.automatic or config.uncalibrated == "lora"
    return not has_choice or config.needs().rank_limit(shape) >= 1


def _ranks(
    name: str, shape: tuple[int, int] | None, config: GradInitConfig
) -> tuple[int, int, float]:
    requested, alpha, need = rank_of(config, name), alpha_of(config, name), config.needs()
    if config.automatic and shape is None:  # it is no candidate
        return 0, requested, alpha
    r = requested if shape is None else min(requested, need.rank_limit(shape))
    if r < 1:
        raise TargetError(
            f"{config.method} with r={requested} cannot start {name}: its weight is {shape}, and "
            f"even rank 1 needs {max(1, need.size(1))} singular directions; set "
            "uncalibrated='lora' to start such a layer as plain LoRA, add it to exclude_modules, or "
            "take it out of target_parameters."
        )
    if r != requested:
        alpha *= alpha_growth(r / requested, use_rslora=config.use_rslora)
    return r, 0 if name in config.added else requested, alpha


def _check_kinds(targets: Mapping[str, Target], config: GradInitConfig) -> None:
    unstartable = {n: t for n, t in targets.items() if t.shape is None and t.r}
    others = {n: type(t.module).__name__ for n, t in unstartable.items()}
    if others and config.uncalibrated == "error":
        raise TargetError(
            f"{config.method} starts linear layers ({LINEAR_KINDS}), but target_modules also "
            f"matches {others}; exclude them, or set uncalibrated='lora' to give them a plain LoRA "
            "start."
        )


def _check_loaded_for_dora(targets: Mapping[str, Target], config: GradInitConfig) -> None:
    offloaded = [name for name, target in targets.items() if is_offloaded(target.module)]
    if config.use_dora and offloaded:
        raise TargetError(
            "use_dora=True reads the base weight outside of its layer's forward pass, but then the "
            f"weights of {len(offloaded)} targets ({offloaded[0]}, …) are offloaded; set "
            "use_dora=False, or keep them on the device in device_map."
        )


_RECORDED = "gradinit_recorded"
"""Name of the adapter whose injection is recorded; no user's adapter has it."""


class _Recorded(Exception):  # noqa: N818 control flow, not an error
    """Ends the injection before it changes anything."""


class _TargetRecorder(LoraModel):
    """Lets PEFT's own `inject_adapter` choose the modules, and records them without wrapping them.

    So `all-linear`, regular expressions, `exclude_modules`, `layers_to_transform` and options of
    later versions of PEFT have PEFT's meaning.
    """

    def __init__(self, model: nn.Module, config: LoraConfig, others: Mapping[str, Any]) -> None:
        nn.Module.__init__(self)
        self.model = model
        config.peft_type = PeftType.LORA  # whose layers PEFT checks, such as Mamba's out_proj
        self.peft_config = {**others, _RECORDED: config}
        self.active_adapter = _RECORDED
        self.targeted_module_names = []
        self.targeted_parameter_names = []
        self._found: dict[str, tuple[nn.Module, str | None]] = {}

    def record(
        self, state_dict: dict[str, Tensor] | None = None
    ) -> dict[str, tuple[nn.Module, str | None]]:
        """By name, the modules that an injection would adapt, with a parameter's name or `None`."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real injection repeats them
            with suppress(_Recorded):
                LoraModel.inject_adapter(self, self.model, _RECORDED, state_dict=state_dict)
        return self._found

    def _create_and_replace(self, *args: Any, **kwargs: Any) -> None:
        _, _, target, _, _ = args[:5]
        self._found[kwargs["current_key"]] = (target, kwargs.get("parameter_name"))

    def set_adapter(self, *args: Any, **kwargs: Any) -> None:
        raise _Recorded


_TargetRecorder.__name__ = LoraModel.__name__  # PEFT's errors begin with it
