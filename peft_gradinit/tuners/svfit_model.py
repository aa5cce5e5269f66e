"""The SVFit tuner: wraps linear layers, computes their bases, and saves and loads both forms."""

import copy
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..calibration import stored_weight, whole
from ..errors import ConfigError, TargetError
from ..statistics import Fingerprint, hash_weight
from .copying import copy_adapter, source_of
from .publishing import attend, card_tags
from .report import ReportsByAdapter
from .rollback import all_or_nothing, remove_adapter
from .start import base_fingerprint
from .svfit_config import SpectralConfig
from .svfit_layer import SVFitLinear, checked_shape
from .svfit_saving import compact_form, live_form, live_layers, lora_form


class SVFitModel(ReportsByAdapter, BaseTuner):
    """Adapters that train the `r` numbers of `delta` in `y = W x + U (delta * (Vh x))`."""

    prefix: str = "svfit_"
    tuner_layer_cls = SVFitLinear
    target_module_mapping = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    @property
    def model_tags(self) -> list[str]:
        """Tags that `Trainer` and TRL put on the cards that they write."""
        return card_tags(self)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Wrap the targets and compute their bases; after a failure the model is as it was.

        Args:
            model: the base model.
            adapter_name: key of the config in `peft_config`.
            autocast_adapter_dtype: without effect: the adapter is float32.
            low_cpu_mem_usage: without effect: a basis cannot be computed on the meta device.
            state_dict: passed on to PEFT.
        """
        with all_or_nothing(model, lambda: remove_adapter(self, adapter_name)):
            self._inject(model, adapter_name, (autocast_adapter_dtype, False, state_dict))

    def _inject(self, model: nn.Module, adapter_name: str, options: tuple[Any, ...]) -> None:
        source = source_of(self.peft_config, adapter_name)
        # Ranks are written into it.
        config = cast("SpectralConfig", copy.copy(self.peft_config[adapter_name]))
        self.peft_config[adapter_name] = config
        _check_not_merged(model)
        weights = base_fingerprint(model, config)
        super().inject_adapter(model, adapter_name, *options)
        layers = live_layers(model, adapter_name)
        _warn_of_lowered_ranks(config, layers, adapter_name)
        if source is not None:
            copy_adapter(model, source, adapter_name)
        for name, layer in layers.items():
            if source is None:
                weight = _finite_matrix(name, layer)
                layer.fill(adapter_name, *config.basis(weight, layer.r[adapter_name], name))
            layer.weight_hash[adapter_name] = hash_weight(
                whole(stored_weight(layer.get_base_layer()))
            )
        bases = [layer.get_base_layer() for layer in layers.values()]
        config.fan_in_fan_out = any(isinstance(base, Conv1D) for base in bases)
        config.ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
        config.fingerprint = Fingerprint(
            statistic="weight",
            weights=weights,
            targets={
                name: [layer.out_features, layer.in_features, layer.r[adapter_name]]
                for name, layer in layers.items()
            },
            options=config.basis_options(),
        )

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
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        shape = checked_shape(current_key, base)
        layer = target if isinstance(target, SVFitLinear) else SVFitLinear(target)
        r = min(*shape, peft_config.requested_rank(current_key, shape))
        layer.add_adapter(adapter_name, r)
        if layer is not target:
            self._replace_module(parent, target_name, layer, target)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        # PEFT would drop the argument without a word.
        if kwargs.get("adapter_names") is not None:
            raise ConfigError(
                f"SVFit cannot mix adapters in one batch, got adapter_names="
                f"{kwargs['adapter_names']!r}; save the adapters and load them as plain LoRA with "
                "PeftModel.from_pretrained, which can."
            )
        yield

    def add_weighted_adapter(self, adapters: list[str], *args: Any, **kwargs: Any) -> None:
        """Refuse: a sum of spectral adapters is a LoRA of another basis.

        Args:
            adapters: names of adapters.
            args: unused.
            kwargs: unused.

        Raises:
            ConfigError: always, with the way that works.
        """
        raise ConfigError(
            f"add_weighted_adapter cannot combine the live SVFit adapters {adapters}; save them and "
            "combine them as plain LoRA, loaded with PeftModel.from_pretrained."
        )

    # Saving and loading: PEFT's hooks ---------------------------------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        attend(model)
        entries = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
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


def _check_not_merged(model: nn.Module) -> None:
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer) and layer.merged:
            raise ConfigError(
                f"the adapters {layer.merged_adapters} are merged into the base weights, whose "
                "singular vectors a new adapter needs; call unmerge_adapter() first."
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


def _warn_of_lowered_ranks(
    config: SpectralConfig, layers: dict[str, SVFitLinear], adapter_name: str
) -> None:
    """Name the layers with fewer directions than asked for, and keep their ranks in the config."""
    lowered = {}
    for name, layer in layers.items():
        shape, r = (layer.out_features, layer.in_features), layer.r[adapter_name]
        if r < (requested := config.requested_rank(name, shape)):
            lowered[name] = (r, requested)
    if lowered:
        patterns = {f"^{re.escape(name)}": r for name, (r, _) in lowered.items()}
        config.rank_pattern = {**patterns, **config.rank_pattern}  # the first match counts
        names = ", ".join(f"{name} ({r} of {asked})" for name, (r, asked) in lowered.items())
        warnings.warn(
            f"these layers have fewer singular directions than asked for and get a lower rank: {names}.",
            stacklevel=2,
        )
