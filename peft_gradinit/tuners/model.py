"""The tuner model of all methods: calibrates, lets PEFT inject LoRA, and writes the start in."""

import copy
import warnings
from typing import Any

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from ..calibration import left_as_found
from ..errors import NotInitializedError
from .anchored import (
    ORIGINAL,
    anchor_layer,
    anchor_of,
    fill_anchored,
    is_anchored,
    is_pending,
    join,
    release_anchor,
    split,
)
from .config import GradInitConfig
from .report import InitReport
from .start import Start, compute_start
from .targets import Target, adapters_disabled, resolve_targets, write_patterns

_PREFIX = "base_model.model."


class GradInitModel(LoraModel):
    """`peft.LoraModel` whose adapters get their start from the config's method.

    Attributes:
        init_report: an `InitReport` by adapter name; absent for deferred and loaded adapters.
    """

    @property
    def init_report(self) -> dict[str, InitReport]:
        """Reports of this model's adapters, by adapter name."""
        return {
            name: report
            for name, config in self.peft_config.items()
            if (report := getattr(config, "init_report", None)) is not None
        }

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Calibrate, then inject, then fill; a failed calibration leaves the model as it was.

        `get_peft_model` and `add_adapter` both come through here.

        Args:
            model: the base model.
            adapter_name: key of the config in `peft_config`.
            args: passed on to PEFT.
            kwargs: passed on to PEFT.
        """
        config = self.peft_config[adapter_name]
        if not isinstance(config, GradInitConfig):
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            return
        config = self.peft_config[adapter_name] = copy.copy(config)  # ranks may be lowered in it
        # Parameters made in a caller's inference mode could never be trained.
        with torch.inference_mode(False):
            targets = resolve_targets(model, config)
            start = None
            if not config.is_deferred:
                start = compute_start(model, targets, config, config.calibration)
            write_patterns(targets, config)
            super().inject_adapter(model, adapter_name, *args, **kwargs)
            self._anchor(targets, adapter_name)
            if start is not None:
                self.fill(adapter_name, start)

    def fill(self, adapter_name: str, start: Start) -> InitReport:
        """Write a start into an injected adapter and report on it.

        Args:
            adapter_name: the adapter.
            start: its factors.

        Returns:
            The report, also kept in `init_report`.
        """
        config = self._config(adapter_name)
        self._write(adapter_name, start)
        if start.result.failures:
            self._release(adapter_name)
        self._unrounded = {adapter_name: start}
        config.fingerprint = start.result.fingerprint
        config.init_report = start.report(config.method, self._drift(adapter_name, start))
        return config.init_report

    def _anchor(self, targets: dict[str, Target], adapter_name: str) -> None:
        config = self._config(adapter_name)
        if not config.anchored:
            return
        for name, target in targets.items():
            layer = self.model.get_submodule(name)
            if target.shape is not None and isinstance(layer, LoraLayer):
                anchor_layer(layer, adapter_name)
        others = {n: type(t.module).__name__ for n, t in targets.items() if t.shape is None}
        if others:
            warnings.warn(f"{config.method} gives {others} a plain LoRA start.", stacklevel=2)

    def _write(self, adapter_name: str, start: Start) -> None:
        for name, (A0, B0) in start.factors.items():
            fill_anchored(self._layer(name), adapter_name, A0, B0)

    def _release(self, adapter_name: str) -> None:
        for layer in self.model.modules():
            if is_pending(layer, adapter_name) and isinstance(layer, LoraLayer):
                release_anchor(layer, adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast like PEFT, then write the start again at the dtype that the adapter ends up with."""
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        start = self.__dict__.pop("_unrounded", {}).get(adapter_name)
        if start is not None:
            self._write(adapter_name, start)

    def _drift(self, adapter_name: str, start: Start) -> float | None:
        """Relative change of the output on the first sequence of the data."""
        probe, calibration = start.result.probe, start.calibration
        if probe is None:
            return None
        active = self.active_adapters
        with left_as_found(self.model, None, calibration.seed), torch.no_grad():
            with adapters_disabled(self.model):
                base = _output(self.model, probe, calibration.loss_fn)
            self._activate([adapter_name])
            try:
                started = _output(self.model, probe, calibration.loss_fn)
            finally:
                self._activate(active)
        return ((started - base).norm() / base.norm().clamp_min(1e-30)).item()

    def _activate(self, adapter_names: list[str]) -> None:
        """Choose the adapters that run; unlike `set_adapter`, no `requires_grad` is touched."""
        for module in self.model.modules():
            if isinstance(module, LoraLayer):
                module._active_adapter = list(adapter_names)

    def _layer(self, name: str) -> LoraLayer:
        layer = self.model.get_submodule(name)
        if not isinstance(layer, LoraLayer):
            raise TypeError(f"{name} is a {type(layer).__name__}, expected a LoRA layer")
        return layer

    def _config(self, adapter_name: str) -> GradInitConfig:
        return self.peft_config[adapter_name]

    # Saving and loading: PEFT's hooks, pure state-dict arithmetic ------------------------------

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: dict[str, Tensor],
        unwanted_adapter_names: list[str],
    ) -> dict[str, Tensor]:
        pending = [name for name, layer in model.named_modules() if is_pending(layer, adapter_name)]
        if pending:
            raise NotInitializedError(
                f"adapter {adapter_name!r} is deferred and {len(pending)} layers ({pending[0]}, …) "
                "have no start yet, so there is nothing to save; call initialize(model, data)."
            )
        entries = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        return join(entries) if config.anchored else entries

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # In anchored keys the name stands before "parametrizations", where PEFT does not look.
        named, plain = f".{adapter_name}.parametrizations.", ".parametrizations."
        if named in key:
            return plain.join(key.rsplit(named, 1))
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        if config.anchored:
            layers = {n: m for n, m in model.named_modules() if is_anchored(m, adapter_name)}
            prefixed = any(key.startswith(_PREFIX) for key in state_dict)
            ranks = {
                _as_in_file(name, prefixed): layer.r[adapter_name]
                for name, layer in layers.items()
                if isinstance(layer, LoraLayer)
            }
            state_dict = split(state_dict, ranks)
            for name, layer in layers.items():
                if f"{_as_in_file(name, prefixed)}.lora_A.{ORIGINAL}" in state_dict:
                    for side in (layer.lora_A, layer.lora_B):
                        anchor_of(side[adapter_name]).pending = False
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _as_in_file(name: str, prefixed: bool) -> str:
    if prefixed and not name.startswith(_PREFIX):
        return _PREFIX + name
    return name if prefixed else name.removeprefix(_PREFIX)


def _output(model: nn.Module, batch: Any, loss_fn: Any) -> Tensor:
    """The first tensor that the model returns besides the loss; the loss itself for a `loss_fn`."""
    if loss_fn is not None:
        loss = loss_fn(model, batch)
        return (loss[0] if isinstance(loss, tuple) else loss).float()
    output = model(**batch) if isinstance(batch, dict) else model(*batch)
    values = output.values() if isinstance(output, dict) else output
    tensors = [v for v in values if isinstance(v, Tensor) and v.dim() > 0]
    return (tensors or [next(iter(values))])[0].float()
