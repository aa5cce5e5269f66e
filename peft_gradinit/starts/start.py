"""From targets and data to factors: the pass, the method's factors, the lines of the report."""

import dataclasses
import math
import zlib
from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..calibration import Calibration, CalibrationResult, Measured, measure
from ..errors import ConfigError
from ..layouts import agreed, processes, whole_modules
from ..linalg import frobenius_of_product, rate_of_start
from ..records import InitReport, ModuleReport, StepCheck, scaling
from ..statistics import Fingerprint
from .allocation import allocated, offered_rank
from .base import base_hashes
from .checks import check_complete, check_failures, check_ranks, those_that_train
from .config import GradInitConfig
from .switching import adapters_disabled, check_not_merged
from .target import Target
from .targets import resolve_targets, with_converted_targets


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of an adapter, before it is written into the layers.

    Attributes:
        targets: targets with their final ranks; rank 0 for those that lose their adapter.
        factors: `A0 (r, in)`, `B0 (out, r)` by target name; absent for plain starts.
        scalings: of the products, by name of every target with factors.
        modules: lines of the report, without rates.
        fingerprint: identity of model, targets and options.
        result: the measurements; `None` for methods that measure nothing.
        calibration: options of the pass, whose loss the start is measured with as well.
        runner: the wrapper that is called to run a sharded model; `None`: the model itself.
    """

    targets: Mapping[str, Target]
    factors: Mapping[str, tuple[Tensor, Tensor]]
    scalings: Mapping[str, float]
    modules: tuple[ModuleReport, ...]
    fingerprint: Fingerprint
    result: CalibrationResult | None
    calibration: Calibration
    runner: nn.Module | None = None

    def factors_by_layer(self) -> dict[str, dict[int, tuple[Tensor, Tensor]]]:
        """Factors by layer or parameter and index of the expert, which is 0 for layers."""
        layers: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        for name, pair in self.factors.items():
            target = self.targets[name]
            index = 0 if target.expert is None else target.expert.index or 0
            layers.setdefault(target.adapted, {})[index] = pair
        return layers

    def report(self, method: str, drift: float | None, step: StepCheck | None) -> InitReport:
        """The report of this start, whose products `step` has scaled."""
        scale = step.scale if step else 1.0
        modules = [
            dataclasses.replace(
                line,
                start_norm=scale * line.start_norm,
                learning_rate=self._rate(line.name, math.sqrt(scale)),
            )
            for line in self.modules
        ]
        facts = self.result.facts if self.result else None
        return InitReport(method, tuple(modules), facts, drift, step)

    def _rate(self, name: str, times: float) -> float | None:
        """The rate to begin with for a layer's factors, each multiplied by `times`, if it has one."""
        if not self.scalings.get(name):
            return None
        A0, B0 = self.factors[name]
        return rate_of_start(times * A0, times * B0, self.scalings[name])


def compute_start(
    model: nn.Module,
    targets: Mapping[str, Target],
    config: GradInitConfig,
    calibration: Any,
    runner: nn.Module | None = None,
    *,
    adapter_name: str | None = None,
) -> Start:
    """Measure, or take a saved result, and compute every target's factors.

    The model stays as it is. `calibration` is a value of `calibration=` other than `"deferred"`.
    `runner` is the wrapper of a sharded model, `adapter_name` the adapter if the model has it.

    Raises:
        ConfigError: if `calibration` is `None`, or an adapter is merged into the base weights.
    """
    check_not_merged(model)
    if not config.needs().reads_data:
        fingerprint = _fingerprint(model, targets, config, {"seed": 0})
        return _start(model, targets, config, (fingerprint, None, Calibration(())), runner)
    if calibration is None:
        raise ConfigError(
            f"{type(config).__name__} has no calibration, and without one the adapter would be "
            "plain LoRA; pass calibration=<DataLoader, dataset, or path of a saved "
            "CalibrationResult>, or calibration='deferred' and call initialize(peft_model, data), "
            "or train with a CalibrationCallback."
        )
    calibration = Calibration.of(calibration)
    if all(target.shape is None for target in targets.values()):  # there is nothing to measure
        fingerprint = _fingerprint(model, targets, config, {})
        return _start(model, targets, config, (fingerprint, None, calibration), runner)
    result = measured(model, targets, config, calibration, runner, adapter_name=adapter_name)
    check_complete(result, config)
    check_failures(result.failures, targets, config)
    targets = allocated(targets, result, config, model)
    check_ranks(result, targets, config)
    source = (result.fingerprint, result, result.options or calibration)
    return _start(model, targets, config, source, runner)


def _start(
    model: nn.Module,
    targets: Mapping[str, Target],
    config: GradInitConfig,
    source: tuple[Fingerprint, CalibrationResult | None, Calibration],
    runner: nn.Module | None,
) -> Start:
    fingerprint, result, calibration = source
    seed = fingerprint.options.get("seed", 0)
    startable = {n: t for n, t in targets.items() if t.r and t.shape is not None}
    if result is not None:
        startable = {n: t for n, t in startable.items() if n in result.readouts}
    with whole_modules(runner or model):
        factors = {n: _factors(result, t, config, seed) for n, t in startable.items()}
        if config.reads_weights:
            _agree(factors, model)
        factors = those_that_train(factors, config)
        lines = [_line(result, t, config, factors.get(n)) for n, t in targets.items()]
    scalings = {n: _scaling(targets[n], config) for n in factors}
    return Start(targets, factors, scalings, tuple(lines), fingerprint, result, calibration, runner)


def _agree(factors: Mapping[str, tuple[Tensor, Tensor]], model: nn.Module) -> None:
    """Overwrite the factors with the first process's: singular vectors may differ by process."""
    with processes(model) as world:
        world.broadcast_([part for pair in factors.values() for part in pair], 0)


def measured(
    model: nn.Module,
    targets: Mapping[str, Target],
    config: GradInitConfig,
    calibration: Calibration,
    runner: nn.Module | None = None,
    *,
    adapter_name: str | None = None,
) -> CalibrationResult:
    """Run the calibration pass without adapters, or check and return a saved result."""
    saved = calibration.saved_result()
    if saved is not None:
        options = calibration.demanded_options()
        with whole_modules(runner or model):
            saved.fingerprint.check(_fingerprint(model, targets, config, options))
        return saved
    with agreed(model), whole_modules(runner or model):
        options = calibration.measurement_options()
        fingerprint = _fingerprint(model, targets, config, options)
    modules = {name: t.measurable for name, t in targets.items() if t.shape is not None}
    with adapters_disabled(model, adapter_name):
        need = cast("Measured", config.needs())
        return measure(runner or model, modules, calibration, fingerprint, need)


def _fingerprint(
    model: nn.Module,
    targets: Mapping[str, Target],
    config: GradInitConfig,
    options: Mapping[str, Any],
) -> Fingerprint:
    return Fingerprint(
        statistic=config.needs().statistic,
        weights=base_hashes(model),
        targets=_sizes_of(targets, config),
        options={**options, **config.needs().options()},
    )


def planned_targets(model: nn.Module, config: GradInitConfig) -> dict[str, list[int]]:
    """`[out, in, triplets]` of every target that a calibration would measure, by name.

    The model may be on the meta device.
    """
    config = with_converted_targets(config, model)
    return _sizes_of(resolve_targets(model, config), config)


def _sizes_of(targets: Mapping[str, Target], config: GradInitConfig) -> dict[str, list[int]]:
    return {
        name: [*t.shape, config.needs().size(offered_rank(t, config))]
        for name, t in targets.items()
        if t.shape is not None
    }


def _rank_note(target: Target) -> str:
    if target.r == target.requested_r:
        return ""
    return target.reason or f"r lowered from {target.requested_r}"


def _factors(
    result: CalibrationResult | None, target: Target, config: GradInitConfig, seed: int
) -> tuple[Tensor, Tensor]:
    readouts = result.readouts[target.name] if result else {}
    module_seed = zlib.crc32(target.name.encode()) + seed
    A0, B0 = config.factors(readouts, target, _scaling(target, config), module_seed)
    return A0.float().contiguous(), B0.float().contiguous()


def _scaling(target: Target, config: GradInitConfig) -> float:
    return scaling(target.alpha, target.r, use_rslora=config.use_rslora)


def _line(
    result: CalibrationResult | None,
    target: Target,
    config: GradInitConfig,
    factors: tuple[Tensor, Tensor] | None,
) -> ModuleReport:
    note, name = _rank_note(target), target.name
    if target.r == 0:
        note = result.failures.get(name, note) if result else note
        return ModuleReport(name, "none", 0, target.requested_r, None, 0.0, note)
    if factors is None:
        kind = f"{type(target.module).__name__} has no start of this method"
        note = result.failures.get(name, kind) if result else kind
        return ModuleReport(name, "lora", target.r, target.requested_r, None, 0.0, note)
    captured = None
    if result is not None:
        captured = config.needs().captured(result.readouts[name], target.r, result.energy[name])
    A0, B0 = factors
    scale = _scaling(target, config)
    start = scale * frobenius_of_product(B0, A0)
    norm = torch.linalg.matrix_norm(target.weight()).item()
    return ModuleReport(
        name=name,
        method=config.method,
        r=target.r,
        requested_r=target.requested_r,
        captured_energy=captured,
        start_norm=0.0 if start == 0 else start / norm if norm else math.inf,
        fallback=note,
    )
