"""The SVFit tuner: wraps linear layers, computes their bases, and saves and loads both forms."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import (
    INCLUDE_LINEAR_LAYERS_SHORTHAND,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ...errors import ConfigError, TargetError, warn
from ...layouts import weight_hash
from ...records import (
    AdapterRecord,
    WithReports,
    attach_record,
    keep_record,
    patterns,
    plain_config,
    targets_asked,
)
from ...starts import (
    SpectralConfig,
    adapted_by_peft,
    base_fingerprint,
    check_no_head,
    check_not_merged,
    warn_of_idle,
)
from ...statistics import Fingerprint
from ..checks import (
    check_adapter_name,
    check_injected_once,
    check_modules_to_save,
    check_not_compiled,
)
from ..copying import copied_from, copy_adapter
from ..offloaded import OffloadedBase
from ..rollback import all_or_nothing, remove_adapter
from ..saving import RecordedSaves
from .layer import SVFitLinear, checked_shape
from .saving import compact_form, live_form, live_layers, lora_form


class SVFitModel(WithReports, RecordedSaves, OffloadedBase, BaseTuner):
    """Adapters that train the `r` numbers of `delta` in `y = W x + U (delta * (Vh x))`."""

    prefix: str = "svfit_"
    tuner_layer_cls = SVFitLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wrap the targets and compute their bases; after a failure the model is as it was.

        `autocast_adapter_dtype` has no effect, since the adapter is float32, nor has
        `low_cpu_mem_usage`, since a basis cannot be computed on the meta device.
        """
        check_adapter_name(adapter_name, self.prefix)
        check_injected_once(self, model, adapter_name)
        check_not_compiled(self, model, adapter_name)
        _check_trains(cast("SpectralConfig", self.peft_config[adapter_name]))
        if state_dict is not None:  # PEFT takes the names of the layers from it, by our prefix
            state_dict = {k.replace(".lora_", f".{self.prefix}"): v for k, v in state_dict.items()}
        with all_or_nothing(model, lambda: remove_adapter(self, adapter_name)):
            self._inject(model, adapter_name, (autocast_adapter_dtype, False, state_dict))

    def _inject(self, model: nn.Module, adapter_name: str, options: tuple[Any, ...]) -> None:
        config = cast("SpectralConfig", self.peft_config[adapter_name])
        source = copied_from(self.peft_config, adapter_name)
        check_not_merged(model)
        check_modules_to_save(model, config)
        weights = base_fingerprint(model, config)
        config.target_modules = asked = targets_asked(config, model)
        _leave_out_experts(config, model)
        super().inject_adapter(model, adapter_name, *options)
        layers = live_layers(model, adapter_name)
        warn_of_idle(model, layers)
        _warn_of_lowered(config, layers, adapter_name)
        if source is not None:
            copy_adapter(model, source, adapter_name)
        for name, layer in layers.items():
            if source is None:
                weight = _finite_matrix(name, layer)
                U, Vh = config.basis(weight, layer.r[adapter_name], name)
                layer.fill(adapter_name, U, Vh)
                layer.largest[adapter_name] = (weight @ Vh[0]).norm().item()
            else:
                layer.largest[adapter_name] = layer.largest[source]
            layer.weight_hash[adapter_name] = weight_hash(layer.get_base_layer())
        bases = [layer.get_base_layer() for layer in layers.values()]
        ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
        record = AdapterRecord(
            adapter_name,
            config=config,
            asked=asked,
            resolved={"target_modules": config.target_modules}
            | _rank_pattern(config, layers, ranks),
            ranks=ranks,
            fan_in_fan_out=any(isinstance(base, Conv1D) for base in bases),
            fingerprint=Fingerprint(
                statistic=config.needs().statistic,
                weights=weights,
                targets={n: [x.out_features, x.in_features, ranks[n]] for n, x in layers.items()},
                options=config.basis_options(),
            ),
        )
        if config.saves_lora and options[2] is None:
            _check_loads(model, config.saved_config(record), set(layers))
        keep_record(model, adapter_name, record)
        attach_record(config, record)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        check_no_head(current_key, peft_config)
        if isinstance(target, BaseTunerLayer) and not isinstance(target, SVFitLinear):
            raise TargetError(
                f"SVFit cannot adapt {current_key}, which has an adapter of another kind already "
                f"({type(target).__module__}.{type(target).__name__}): saved, that one would not load "
                "again. Add the SVFit adapter first, or add the layer to exclude_modules."
            )
        base = target.get_base_layer() if isinstance(target, SVFitLinear) else target
        shape = checked_shape(current_key, base)
        r = min(*shape, peft_config.requested_rank(current_key, shape))
        layer = target if isinstance(target, SVFitLinear) else SVFitLinear(target)
        layer.add_adapter(adapter_name, r)
        if layer is not target:
            setattr(parent, target_name, layer)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        # PEFT's goes on to move a weight, which heads that are trained in full have in their parts.
        del child
        setattr(parent, child_name, new_module)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT would ignore the argument without a warning.
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                f"SVFit cannot mix adapters in one batch, got adapter_names="
                f"{kwargs['adapter_names']!r}; save the adapters and load them as plain LoRA with "
                "PeftModel.from_pretrained, which can."
            )
        yield

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Refuse with `ConfigError`: a sum of spectral adapters is no spectral adapter."""
        raise ConfigError(
            f"add_weighted_adapter cannot combine the live SVFit adapters {adapters}; save them "
            "and combine them as plain LoRA, loaded with PeftModel.from_pretrained."
        )

    # Saving and loading: PEFT's hooks ---------------------------------------------------------

    @classmethod
    def _form_of_file(
        cls, model: nn.Module, config: Any, adapter_name: str, entries: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if config.saves_lora:
            return lora_form(entries, adapter_name, config.factors)
        return compact_form(entries, adapter_name, live_layers(model, adapter_name))

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        layers = live_layers(model, adapter_name)
        state_dict = live_form(state_dict, config, adapter_name, layers)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _check_trains(config: SpectralConfig) -> None:
    # Transformers loads a state dict with the config of the live adapter in this way.
    if config.inference_mode and config.saves_lora:
        raise ConfigError(
            "the saved form of this SVFit adapter is plain LoRA, which an SVFit config for "
            "inference cannot load; pass peft_config=LoraConfig(**values), where values are "
            "config.to_dict() of the live adapter without 'peft_type', or load the saved folder."
        )


def _leave_out_experts(config: SpectralConfig, model: nn.Module) -> None:
    """Take out of `"all-linear"` the layers that PEFT would look for among experts on loading.

    Experts were linear layers in Transformers 4. PEFT turns their names into parameters when it
    loads an adapter, and with them dense layers of the same name.
    """
    if config.target_modules != INCLUDE_LINEAR_LAYERS_SHORTHAND or not config.saves_lora:
        return
    plain = plain_config(config, r=1, rank_pattern={})
    convert_peft_config_for_transformers(plain, model, None)
    if plain.target_parameters:
        config.target_modules = cast("Any", plain.target_modules)
        warn(
            "SVFit leaves out the linear layers of this model that share their names with experts, "
            "since PEFT would load an adapter on them as one on the experts; with "
            "save_format='compact' they can be targeted."
        )


def _check_loads(model: nn.Module, plain: LoraConfig, layers: set[str]) -> None:
    """Refuse an adapter whose saved form PEFT would load onto other layers."""
    if differing := sorted(adapted_by_peft(model, plain).keys() ^ layers):
        raise TargetError(
            f"PEFT would not load the saved adapter onto the same layers: {', '.join(differing)} "
            "would be lost, or come in their place; leave such layers out of target_modules, or "
            "set save_format='compact'."
        )


def _finite_matrix(name: str, layer: SVFitLinear) -> Tensor:
    shape = (layer.out_features, layer.in_features)
    weight = layer.base_matrix()
    if weight.is_meta or tuple(weight.shape) != shape:
        raise TargetError(
            f"SVFit needs the whole weight of {name}, {shape}, but got {tuple(weight.shape)} on "
            f"{weight.device}; load or gather the weights before adding the adapter."
        )
    if not weight.isfinite().all():
        raise TargetError(
            f"the weight of {name} has values that are not finite and no singular vectors; repair "
            "the base model, or add the module to exclude_modules."
        )
    return weight


def _warn_of_lowered(
    config: SpectralConfig, layers: dict[str, SVFitLinear], adapter_name: str
) -> None:
    """Name the layers with fewer directions than asked for."""
    notes = []
    for name, layer in layers.items():
        shape, r = (layer.out_features, layer.in_features), layer.r[adapter_name]
        if r < (requested := config.requested_rank(name, shape)):
            notes.append(f"{name} ({r} of {requested})")
    if notes:
        warn(
            "these layers have fewer singular directions than asked for and get a lower rank: "
            f"{', '.join(notes)}."
        )


def _rank_pattern(
    config: SpectralConfig, layers: Mapping[str, SVFitLinear], ranks: Mapping[str, int]
) -> dict[str, Any]:
    """A `rank_pattern` with a key for each layer, if the user's would say something else in a file.

    Files have the keys sorted, and PEFT takes the first match.
    """
    in_file = copy.copy(config)
    in_file.rank_pattern = dict(sorted(config.rank_pattern.items()))
    asked = {
        n: in_file.requested_rank(n, (x.out_features, x.in_features)) for n, x in layers.items()
    }
    return {} if asked == ranks else {"rank_pattern": patterns(ranks, config.r)}
