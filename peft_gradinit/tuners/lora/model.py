"""The tuner model of all LoRA methods: it calibrates, lets PEFT inject LoRA, and writes the start.

PEFT calls `inject_adapter` first and then, from `get_peft_model` and `add_adapter`,
`_cast_adapter_dtype`. PEFT passes nothing from one to the next; two attributes do.
"""

import copy
import dataclasses
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from ...errors import ConfigError, warn
from ...layouts import whole_modules
from ...records import (
    AdapterRecord,
    InitReport,
    WithReports,
    attach_record,
    attached_record,
    keep_record,
    plain_config,
    records_of,
    targets_asked,
)
from ...starts import (
    GradInitConfig,
    Start,
    Target,
    compute_start,
    matched_patterns,
    resolve_targets,
    with_converted_targets,
    without_empty,
    write_patterns,
)
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
from .anchored import anchor_layer, fill, renew_magnitude
from .checks import checked_step, drift
from .combining import combined_config, highest_rank
from .deferred import defer, deferred_adapters, mark_started
from .merging import CheckedMerges
from .pairs import adapted_layers, pairs, stacked
from .reshaping import differences, note_shapes, reshaped, targets_in_file
from .saving import check_savable, live_entries, plain_entries

if TYPE_CHECKING:
    from peft import LoraConfig


class GradInitModel(WithReports, RecordedSaves, OffloadedBase, CheckedMerges):
    """`peft.LoraModel` whose adapters get their start from the config's method."""

    _just_started: tuple[str, Start] | None = None
    """Passed from `inject_adapter` to `_cast_adapter_dtype`: the start that was just written."""

    _combining: tuple[list[str], str] | None = None
    """Passed from `add_weighted_adapter` to `inject_adapter`: adapters and kind of combination."""

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, Tensor] | None = None,
    ) -> None:
        """Calibrate, then inject, then fill; after a failure the model is as it was.

        `get_peft_model` and `add_adapter` both call this method.
        """
        options = (autocast_adapter_dtype, low_cpu_mem_usage, state_dict)
        if self._combining is not None:
            adapters, kind = self._combining
            proposed = cast("LoraConfig", self.peft_config[adapter_name])
            self.peft_config[adapter_name] = combined_config(model, adapters, kind, proposed)
        config = self.peft_config[adapter_name]
        if config.inference_mode and (state_dict is not None or attached_record(config)):
            # Transformers loads a state dict with the config of the live adapter in this way.
            self.peft_config[adapter_name] = config = _as_saved(config)
        if not isinstance(config, GradInitConfig):
            super().inject_adapter(model, adapter_name, *options)
            return
        check_adapter_name(adapter_name, self.prefix)
        check_injected_once(self, model, adapter_name)
        check_not_compiled(self, model, adapter_name)
        _check_memory(low_cpu_mem_usage)
        check_modules_to_save(model, config)
        with all_or_nothing(model, lambda: remove_adapter(self, adapter_name)):
            self._inject(model, adapter_name, options)

    def _inject(self, model: nn.Module, adapter_name: str, options: tuple[Any, ...]) -> None:
        config = self._config(adapter_name)
        record = AdapterRecord(adapter_name, config=config, asked=targets_asked(config, model))
        source = copied_from(self.peft_config, adapter_name)
        converted = with_converted_targets(config, model)
        others = {n: other for n, other in self.peft_config.items() if n != adapter_name}
        targets = resolve_targets(model, converted, others, options[2])
        start = None
        injected = copy.copy(converted)
        if source is not None:  # a copy has the ranks of its source
            vars(injected).update(self._record(source).resolved)
            targets = resolve_targets(model, injected, others, options[2])
        elif not config.is_deferred:
            start = compute_start(model, targets, converted, config.calibration)  # pyright: ignore[reportAttributeAccessIssue]
            targets = start.targets
        without_empty(injected, targets)
        record.requested_ranks = write_patterns(targets, injected)
        names = {t.adapted for t in targets.values()}
        before = dict(vars(injected))
        with self._injecting(adapter_name, injected), matched_patterns(injected, names):
            super().inject_adapter(model, adapter_name, *options)
        # The user's config gets the changes that PEFT makes to any config, and no others.
        by_peft = {name: v for name, v in vars(injected).items() if v is not before.get(name)}
        vars(config).update(vars(converted) | by_peft)
        targeted = {"target_modules": config.target_modules}
        record.resolved = targeted | differences(injected, config)
        record.ranks = {t.adapted: t.r for t in targets.values() if t.r}
        keep_record(model, adapter_name, record)
        attach_record(config, record)
        self._prepare_layers(targets, adapter_name)
        if start is not None:
            self.fill(adapter_name, start)
            self._just_started = (adapter_name, start)
        elif source is not None:
            record.copy_of = source
            self._copy(source, adapter_name)

    @contextmanager
    def _injecting(self, adapter_name: str, config: GradInitConfig) -> Iterator[None]:
        """Let PEFT read the options of an injection from another config than the user's."""
        config_of_user = self.peft_config[adapter_name]
        self.peft_config[adapter_name] = config
        try:
            yield
        finally:
            if adapter_name in self.peft_config:
                self.peft_config[adapter_name] = config_of_user

    def _copy(self, source: str, adapter_name: str) -> None:
        """Copy an adapter into another; a deferred one is copied by `fill`, once it has a start."""
        if source in deferred_adapters(self.model):
            return
        copy_adapter(self.model, source, adapter_name)
        for _, layer in adapted_layers(self.model, adapter_name):
            mark_started(layer, adapter_name)
        record, original = self._record(adapter_name), self._record(source)
        record.fingerprint, record.report = original.fingerprint, original.report

    def fill(self, adapter_name: str, start: Start) -> InitReport:
        """Write a start into an injected adapter; the report is also kept in `init_report`."""
        record, model = self._record(adapter_name), self.model
        waiting = deferred_adapters(model)
        copies = [n for n, r in records_of(model).items() if r.copy_of == adapter_name]
        copies = [name for name in copies if name in waiting]
        names = (adapter_name, *copies)
        with ExitStack() as stack:
            shapes = [reshaped(model, name, start.targets) for name in names]
            changed = [stack.enter_context(shape) for shape in shapes]
            record.report = self._filled(adapter_name, start)
        for name in (name for name, new in zip(names, changed, strict=True) if new):
            note_shapes(self._record(name), self._config(name), start.targets)
        record.fingerprint = start.fingerprint
        for name in copies:
            self._copy(adapter_name, name)
        return record.report

    def _filled(self, adapter_name: str, start: Start) -> InitReport:
        """Write a start and measure what it does; after a failure the adapter waits again."""
        config, model, step = self._config(adapter_name), self.model, None
        write = partial(self._write, adapter_name, start)
        try:
            write(1.0)
            if config.checks_step:
                step = checked_step(model, adapter_name, config.method, start, write)
            moved = drift(model, adapter_name, start)
        except BaseException:
            for name, layer in adapted_layers(model, adapter_name):
                if name in start.factors_by_layer():  # so that the call can be repeated
                    mark_started(layer, adapter_name)
                    defer(layer, adapter_name)
            raise
        return start.report(config.method, moved, step)

    def _prepare_layers(self, targets: Mapping[str, Target], adapter_name: str) -> None:
        """Anchor the layers if the method does so, and defer them until they have their start."""
        config, layers = self._config(adapter_name), dict(adapted_layers(self.model, adapter_name))
        for name, target in {t.adapted: t for t in targets.values()}.items():
            if target.shape is not None and target.r:
                if config.anchored:
                    anchor_layer(layers[name], adapter_name)
                defer(layers[name], adapter_name)
        plain = {n: t for n, t in targets.items() if t.shape is None and t.r}
        if others := {n: type(t.module).__name__ for n, t in plain.items()}:
            warn(f"{config.method} gives {others} a plain LoRA start.")

    def _write(self, adapter_name: str, start: Start, times: float) -> None:
        """Write both factors, multiplied by `times`, and let the adapter train."""
        with whole_modules(start.runner or self.model, write=True):
            factors = start.factors_by_layer()
            for pair in pairs(self.model, adapter_name):
                if pair.name in factors:
                    of_experts = {
                        i: (times * A0, times * B0) for i, (A0, B0) in factors[pair.name].items()
                    }
                    fill(pair, *stacked(of_experts, pair))
                    renew_magnitude(pair)
        for _, layer in adapted_layers(self.model, adapter_name):
            mark_started(layer, adapter_name)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Cast like PEFT; if that widens a dtype, write the start again, without rounding."""
        before = [pair.A.dtype for pair in pairs(self.model, adapter_name)]
        super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype)
        (name, start), self._just_started = self._just_started or (None, None), None
        after = [pair.A.dtype for pair in pairs(self.model, adapter_name)]
        if name != adapter_name or start is None or before == after:
            return
        with all_or_nothing(self.model, lambda: remove_adapter(self, adapter_name)):
            record = self._record(adapter_name)
            report = cast("InitReport", record.report)
            self._write(adapter_name, start, math.sqrt(report.step.scale if report.step else 1))
            moved = drift(self.model, adapter_name, start)
            record.report = dataclasses.replace(report, drift=moved)

    def _record(self, adapter_name: str) -> AdapterRecord:
        return records_of(self.model)[adapter_name]

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

        The kinds that add factors need equal ranks. Those that factor the sum have `svd_rank`, by
        default the largest rank of a layer.

        Raises:
            ConfigError: if an adapter is anchored, since PEFT's result would be empty.
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
            # PEFT copies the first config. Options that LoRA does not have must not be copied.
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
    def _check_savable(cls, model: nn.Module, adapter_name: str) -> None:
        check_savable(model, adapter_name)

    @classmethod
    def _form_of_file(
        cls, model: nn.Module, config: Any, adapter_name: str, entries: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        return plain_entries(model, adapter_name, entries) if config.anchored else entries

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        # Anchored keys have the name before "parametrizations", where PEFT does not look for it.
        named, plain = f".{adapter_name}.parametrizations.", ".parametrizations."
        if named in key:
            return plain.join(key.rsplit(named, 1))
        return super()._remove_adapter_name_from_key(key, adapter_name)

    @classmethod
    def _take_shapes(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> None:
        """Give a deferred adapter whose ranks come from data those of a file that is loaded."""
        if not config.allocates_ranks or adapter_name not in deferred_adapters(model):
            return
        targets = targets_in_file(model, adapter_name, config, state_dict)
        with reshaped(model, adapter_name, targets) as changed:
            if changed:
                note_shapes(records_of(model)[adapter_name], config, targets)

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        cls._take_shapes(model, config, adapter_name, state_dict)
        if config.anchored:
            state_dict = live_entries(model, adapter_name, state_dict)
        return super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)


def _check_memory(low_cpu_mem_usage: bool) -> None:
    # `get_peft_model` does not pass the option on. Instead, new modules are on the meta device.
    if low_cpu_mem_usage or nn.LayerNorm(1).weight.is_meta:
        raise ConfigError(
            "low_cpu_mem_usage=True puts the adapter on the meta device, where no start can be "
            "written; leave it at False for configs of this package."
        )


def _as_saved(config: Any) -> Any:
    """The config of the plain LoRA that a state dict or a file of the adapter holds."""
    if not isinstance(config, GradInitConfig):
        return config
    return config.saved_config(attached_record(config))
