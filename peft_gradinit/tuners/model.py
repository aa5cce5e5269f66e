"""The tuner model of all methods: calibrates, lets PEFT inject LoRA, and writes the start in."""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from peft.tuners.lora import LoraLayer, LoraModel
from torch import Tensor, nn

from ..calibration import base_loss, left_as_found, mean_loss, whole_modules
from ..errors import ConfigError, NotInitializedError
from .allocation import without_empty
from .anchored import (
    anchor_layer,
    fill_anchored,
    fill_plain,
    is_anchored,
    join,
    plain_factors,
    split,
)
from .combining import combined_config, highest_rank, plain_config
from .config import GradInitConfig
from .copying import copy_adapter, source_of
from .magnitude import renew_magnitude
from .parameters import (
    find_layer,
    matched_patterns,
    n_experts,
    stacked,
    with_converted_targets,
)
from .pending import hold, is_pending, release
from .publishing import attend, card_tags
from .report import InitReport, ReportsByAdapter, StepCheck
from .rollback import all_or_nothing, remove_adapter
from .start import Start, check_step, compute_start
from .switching import adapter_alone, adapters_disabled
from .targets import Target, resolve_targets, write_patterns

if TYPE_CHECKING:
    from peft import LoraConfig

_PREFIX = "base_model.model."


class GradInitModel(ReportsByAdapter, LoraModel):
    """`peft.LoraModel` whose adapters get their start from the config's method."""

    _just_started: tuple[str, Start] | None = None
    _combining: tuple[list[str], str] | None = None

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
        """Calibrate, then inject, then fill; after a failure the model is as it was.

        `get_peft_model` and `add_adapter` both come through here.

        Args:
            model: the base model.
            adapter_name: key of the config in `peft_config`.
            autocast_adapter_dtype: passed on to PEFT.
            low_cpu_mem_usage: must be `False`.
            state_dict: passed on to PEFT.

        Raises:
            ConfigError: if there is no calibration, or with `low_cpu_mem_usage`.
            TargetError: if the method cannot serve a target.
            CalibrationError: if the pass, or one of its targets, fails.
            FingerprintError: if a saved calibration does not fit.
        """
        options = (autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        if self._combining is not None:
            adapters, kind = self._combining
            proposed = cast("LoraConfig", self.peft_config[adapter_name])
            self.peft_config[adapter_name] = combined_config(model, adapters, kind, proposed)
        if not isinstance(self.peft_config[adapter_name], GradInitConfig):
            super().inject_adapter(model, adapter_name, *options)
            return
        _check_memory(low_cpu_mem_usage)
        with all_or_nothing(model, lambda: remove_adapter(self, adapter_name)):
            self._inject(model, adapter_name, options)

    def _inject(self, model: nn.Module, adapter_name: str, options: tuple[Any, ...]) -> None:
        source = source_of(self.peft_config, adapter_name)
        # A copy, since targets are converted and ranks may be lowered in it.
        config = with_converted_targets(self._config(adapter_name), model)
        config.copy_of = source
        others = {n: other for n, other in self.peft_config.items() if n != adapter_name}
        self.peft_config[adapter_name] = config
        targets = resolve_targets(model, config, others)
        start = None
        if source is None and not config.is_deferred:
            data = config.calibration  # pyright: ignore[reportAttributeAccessIssue]
            start = compute_start(model, targets, config, data)
            targets = start.targets
        without_empty(config, targets)
        write_patterns(targets, config)
        with matched_patterns(config, {t.adapted for t in targets.values()}):
            super().inject_adapter(model, adapter_name, *options)
        self._prepare_layers(targets, adapter_name)
        if start is not None:
            self.fill(adapter_name, start)
            self._just_started = (adapter_name, start)
        elif source is not None:
            self._copy(source, adapter_name)

    def _copy(self, source: str, adapter_name: str) -> None:
        """Copy an adapter into another, unless it has no start yet: then `fill` does so later."""
        modules = list(self.model.modules())
        if any(is_pending(module, source) for module in modules):
            return
        copy_adapter(self.model, source, adapter_name)
        for module in modules:
            release(module, adapter_name)
        config, original = self._config(adapter_name), self._config(source)
        config.fingerprint, config.init_report = original.fingerprint, original.init_report

    def fill(self, adapter_name: str, start: Start) -> InitReport:
        """Write a start into an injected adapter and report on it.

        Args:
            adapter_name: the adapter.
            start: its factors.

        Returns:
            The report, also kept in `init_report`.
        """
        config = self._config(adapter_name)
        try:
            self._write(adapter_name, start)
            step = self._checked_step(adapter_name, start) if config.checks_step else None
            drift = self._drift(adapter_name, start)
        except BaseException:
            for name in start.factors_by_layer():  # so that the call can be repeated
                release(self._layer(name), adapter_name)
                hold(self._layer(name), adapter_name)
            raise
        config.fingerprint = start.result.fingerprint
        config.init_report = start.report(config.method, drift, step)
        self._copy_to_waiting(adapter_name)
        return config.init_report

    def _copy_to_waiting(self, source: str) -> None:
        """Give its start to the adapters that were added as copies before it had one."""
        for name, config in self.peft_config.items():
            waiting = any(is_pending(module, name) for module in self.model.modules())
            if getattr(config, "copy_of", None) == source and waiting:
                self._copy(source, name)

    def _checked_step(self, adapter_name: str, start: Start) -> StepCheck | None:
        """Measure the loss after the start, and halve a start that raises it."""
        replay = start.result.replay
        if replay is None or (replay.custom_loss and start.calibration.loss_fn is None):
            why = "holds no batches" if replay is None else "was made with a loss_fn"
            warnings.warn(
                f"the step that {self._config(adapter_name).method} starts with is not checked: the "
                f"saved calibration {why}; pass the data (and Calibration(…, loss_fn=…)), or "
                "check_step=False to do without.",
                stacklevel=2,
            )
            return None

        def loss_at(scale: float) -> float:
            # Both factors share the scale of their product.
            self._write(adapter_name, start, shrink=math.sqrt(scale))
            with adapter_alone(self.model, adapter_name):
                return mean_loss(start.runner or self.model, replay, start.calibration)

        return check_step(self._config(adapter_name).method, base_loss(replay), loss_at)

    def _prepare_layers(self, targets: Mapping[str, Target], adapter_name: str) -> None:
        """Anchor the layers where the method does, and hold them until they have their start."""
        config = self._config(adapter_name)
        for name, target in {t.adapted: t for t in targets.values()}.items():
            if target.shape is not None and target.r:
                layer = self._layer(name)
                if config.anchored:
                    anchor_layer(layer, adapter_name)
                hold(layer, adapter_name)
        others = {n: type(t.module).__name__ for n, t in targets.items() if t.shape is None}
        if others:
            warnings.warn(f"{config.method} gives {others} a plain LoRA start.", stacklevel=2)

    def _write(self, adapter_name: str, start: Start, shrink: float = 1.0) -> None:
        """Write the factors, both `shrink` times as long, and let the adapter train."""
        with whole_modules(start.runner or self.model, write=True):
            for name, of_experts in start.factors_by_layer().items():
                self._write_layer(name, adapter_name, of_experts, shrink)
        for layer in self.model.modules():
            release(layer, adapter_name)

    def _write_layer(
        self,
        name: str,
        adapter_name: str,
        of_experts: Mapping[int, tuple[torch.Tensor, torch.Tensor]],
        shrink: float,
    ) -> None:
        """Write the factors of a layer, or of a parameter's experts."""
        fill = fill_anchored if self._config(adapter_name).anchored else fill_plain
        layer = self._layer(name)
        scaled = {index: (shrink * A0, shrink * B0) for index, (A0, B0) in of_experts.items()}
        A, B = stacked(scaled, plain_factors(layer, adapter_name), n_experts(layer))
        fill(layer, adapter_name, A, B)
        renew_magnitude(layer, adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast like PEFT; if that widens a dtype, write the start again without its rounding."""
        before = self._dtypes(adapter_name)
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        (name, start), self._just_started = self._just_started or (None, None), None
        if name != adapter_name or start is None or self._dtypes(adapter_name) == before:
            return
        with all_or_nothing(self.model, lambda: remove_adapter(self, adapter_name)):
            config = self._config(adapter_name)
            report = cast("InitReport", config.init_report)
            self._write(adapter_name, start, math.sqrt(report.step.scale if report.step else 1))
            drift = self._drift(adapter_name, start)
            config.init_report = dataclasses.replace(report, drift=drift)

    def _dtypes(self, adapter_name: str) -> list[torch.dtype]:
        return [
            p.dtype
            for layer in self.model.modules()
            if isinstance(layer, LoraLayer) and adapter_name in layer.lora_A
            for p in layer.lora_A[adapter_name].parameters()
        ]

    def _drift(self, adapter_name: str, start: Start) -> float | None:
        """Relative change of the output on the first sequence of the data."""
        probe, calibration = start.result.probe, start.calibration
        runner = start.runner or self.model
        if probe is None:
            return None
        with left_as_found(runner, None, calibration.seed), torch.no_grad():
            try:
                with adapters_disabled(self.model):
                    base = _output(runner, probe, calibration.loss_fn)
                with adapter_alone(self.model, adapter_name):
                    started = _output(runner, probe, calibration.loss_fn)
            except Exception:  # noqa: BLE001 whatever the user's code may raise on one sequence
                return None  # the drift is a figure in the report, no reason to fail
        return ((started - base).norm() / base.norm().clamp_min(1e-30)).item()

    def _layer(self, name: str) -> LoraLayer:
        return find_layer(self.model, name)

    def _config(self, adapter_name: str) -> GradInitConfig:
        return cast("GradInitConfig", self.peft_config[adapter_name])

    def add_weighted_adapter(
        self,
        adapters: list[str],
        weights: list[float],
        adapter_name: str,
        combination_type: Any = "svd",
        svd_rank: int | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Combine adapters like PEFT, into a plain LoRA adapter.

        Args:
            adapters: names of the adapters to combine.
            weights: one number for each.
            adapter_name: name of the combination.
            combination_type: as in PEFT; the kinds that add factors need equal ranks.
            svd_rank: rank of the kinds that factor the sum. Default: the largest of a layer.
            args: passed on to PEFT.
            kwargs: passed on to PEFT.

        Raises:
            ConfigError: if one of them is anchored, where PEFT's result would be empty, or if
                ranks differ where they must not.
        """
        anchored = [n for n in adapters if getattr(self.peft_config.get(n), "anchored", False)]
        if anchored:
            raise ConfigError(
                f"add_weighted_adapter cannot combine the live adapters {anchored}, which hold an "
                "anchor; save them and combine them as plain LoRA, loaded with "
                "PeftModel.from_pretrained."
            )
        if adapter_name in self.peft_config:
            return  # as PEFT does
        svd_rank = svd_rank or highest_rank(self.model, adapters)
        live = dict(self.peft_config)
        self._combining = (list(adapters), combination_type)
        try:
            # PEFT copies the first config, of which only what LoRA knows may count.
            self.peft_config.update({n: plain_config(live[n]) for n in adapters if n in live})
            with all_or_nothing(self.model, lambda: remove_adapter(self, adapter_name)):
                super().add_weighted_adapter(
                    adapters, weights, adapter_name, combination_type, svd_rank, *args, **kwargs
                )
        finally:
            self.peft_config.update(live)
            self._combining = None

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
                "have no start yet, so there is nothing to save; call initialize(model, data), or "
                "train with a CalibrationCallback."
            )
        _check_ranks(model, adapter_name)
        attend(model)
        entries = super()._get_adapter_state_dict(
            model, config, adapter_name, state_dict, unwanted_adapter_names
        )
        if not config.anchored:
            return entries
        prefixed = any(key.startswith(_PREFIX) for key in entries)
        experts = {name: n for name, (_, n) in _anchored(model, adapter_name, prefixed).items()}
        return join(entries, experts)

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
            prefixed = any(key.startswith(_PREFIX) for key in state_dict)
            state_dict = split(state_dict, _anchored(model, adapter_name, prefixed))
        loaded = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        for name, layer in model.named_modules():
            if is_pending(layer, adapter_name) and any(k.startswith(f"{name}.") for k in loaded):
                release(layer, adapter_name)
        return loaded


def _check_ranks(model: nn.Module, adapter_name: str) -> None:
    """Refuse factors that were replaced by wider ones, as preparing for compiled hot-swapping does.

    Raises:
        ConfigError: naming the first layer; what would be saved could not be loaded.
    """
    modules: dict[str, Any] = dict(model.named_modules())
    for name, layer in modules.items():
        if not isinstance(layer, LoraLayer) or adapter_name not in layer.lora_A:
            continue
        linear: Any = layer.lora_A[adapter_name]
        anchored = is_anchored(modules[name], adapter_name)
        weight = linear.parametrizations.weight.original if anchored else linear.weight
        r = layer.r[adapter_name]
        if (
            isinstance(linear, nn.Linear)
            and weight.dim() == 2
            and weight.shape[0] != r * n_experts(layer)
        ):
            raise ConfigError(
                f"{name} has factors of rank {weight.shape[0]}, but the adapter {adapter_name!r} has "
                f"r={r} there: the model was changed, as prepare_model_for_compiled_hotswap does. "
                "Save before that, and prepare the adapter that PeftModel.from_pretrained loads."
            )


def _check_memory(low_cpu_mem_usage: bool) -> None:
    # `get_peft_model` does not hand the option on; it wraps everything in `init_empty_weights`.
    if low_cpu_mem_usage or nn.LayerNorm(1).weight.is_meta:
        raise ConfigError(
            "low_cpu_mem_usage=True puts the adapter on the meta device, where no start can be "
            "written; leave it at False for configs of this package."
        )


def _anchored(model: nn.Module, adapter_name: str, prefixed: bool) -> dict[str, tuple[int, int]]:
    """Rank and number of experts of each anchored layer, by its name in a file."""
    layers: dict[str, Any] = {
        n: m for n, m in model.named_modules() if is_anchored(m, adapter_name)
    }
    return {
        _as_in_file(name, prefixed): (layer.r[adapter_name], n_experts(layer))
        for name, layer in layers.items()
    }


def _as_in_file(name: str, prefixed: bool) -> str:
    if prefixed and not name.startswith(_PREFIX):
        return _PREFIX + name
    return name if prefixed else name.removeprefix(_PREFIX)


def _output(model: nn.Module, batch: Any, loss_fn: Any) -> Tensor:
    """The first tensor that the model returns besides the loss; the loss itself for a `loss_fn`."""
    if loss_fn is not None:
        loss = loss_fn(model, batch)
        return (loss[0] if isinstance(loss, tuple) else loss).float()
    if isinstance(batch, dict):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    values = output.values() if isinstance(output, dict) else output
    tensors = [v for v in values if isinstance(v, Tensor) and v.dim() > 0]
    return (tensors or [next(iter(values))])[0].float()
