"""From targets and data to factors: measures, applies the method, and writes the report."""

import dataclasses
import math
import warnings
import zlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration import (
    Calibration,
    CalibrationResult,
    agreed,
    model_fingerprint,
    whole_modules,
)
from ..errors import CalibrationError, ConfigError, FingerprintError
from ..linalg import rate_of_start
from ..statistics import Fingerprint
from .allocation import allocated, offered_rank
from .config import GradInitConfig
from .report import InitReport, ModuleReport, StepCheck
from .svfit_config import SpectralConfig
from .switching import adapters_disabled
from .targets import Target, frobenius_of_product

_ADAPTER_PARAMETERS = (".lora_", ".svfit_", ".modules_to_save.", ".trainable_tokens_")


_KERNEL_HINT = (
    " If a kernel hides the products with the experts, call "
    "model.set_experts_implementation('eager') before."
)

SMALLEST_STEP = 2.0**-8
"""Where halving a step ends: by then its direction, not its length, is at fault."""


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of an adapter, before it is written into the layers.

    Attributes:
        targets: with the ranks that they get; rank 0 for those that lose their adapter.
        factors: `A0 (r, in)`, `B0 (out, r)` by target name; absent for plain starts.
        result: what the factors were computed from.
        modules: lines of the report.
        calibration: the loss that the pass was made with, to measure the start with.
        runner: what is called to run the model, if not the model itself.
    """

    targets: Mapping[str, Target]
    factors: Mapping[str, tuple[Tensor, Tensor]]
    result: CalibrationResult
    modules: tuple[ModuleReport, ...]
    calibration: Calibration
    runner: nn.Module | None = None

    def factors_by_layer(self) -> dict[str, dict[int, tuple[Tensor, Tensor]]]:
        """The factors of each layer or parameter: by expert; of those without experts, by 0."""
        layers: dict[str, dict[int, tuple[Tensor, Tensor]]] = {}
        for name, pair in self.factors.items():
            target = self.targets[name]
            index = 0 if target.expert is None else target.expert.index or 0
            layers.setdefault(target.adapted, {})[index] = pair
        return layers

    def report(self, method: str, drift: float | None, step: StepCheck | None) -> InitReport:
        """The report of this start."""
        scale = step.scale if step else 1.0
        modules = tuple(
            dataclasses.replace(m, start_norm=scale * m.start_norm) for m in self.modules
        )
        return InitReport(method, modules, self.result.facts, drift, step)


def compute_start(
    model: nn.Module,
    targets: Mapping[str, Target],
    config: GradInitConfig,
    calibration: Any,
    runner: nn.Module | None = None,
) -> Start:
    """Measure, or take what was measured before, and compute every target's factors.

    Nothing of the model is changed.

    Args:
        model: the base model, with or without adapters.
        targets: what to compute starts for.
        config: the method and its options.
        calibration: what `calibration=` may be, except `"deferred"`.
        runner: what to call to run the model: the wrapper of a sharded one. Default: the model.

    Returns:
        The start.

    Raises:
        ConfigError: if `calibration` is `None`.
        CalibrationError: if targets could not be measured and `uncalibrated="error"`.
        FingerprintError: if a saved result is of another model, other targets or other options.
    """
    if calibration is None:
        raise ConfigError(
            f"{type(config).__name__} has no calibration, and without one the adapter would be "
            "plain LoRA; pass calibration=<DataLoader, dataset, or path of a saved "
            "CalibrationResult>, or calibration='deferred' and call initialize(peft_model, data), or "
            "train with a CalibrationCallback."
        )
    calibration = Calibration.of(calibration)
    result = measured(model, targets, config, calibration, runner)
    _check_complete(result)
    _check_failures(result.failures, targets, config)
    seed = result.fingerprint.options.get("seed", 0)
    factors, lines = {}, []
    targets = allocated(targets, result, config)
    with whole_modules(runner or model):
        for name, target in targets.items():
            if name in result.triplets and target.r:
                factors[name] = _factors(result, target, config, seed)
            lines.append(_line(result, target, config, factors.get(name)))
    return Start(targets, factors, result, tuple(lines), result.options or calibration, runner)


def measured(
    model: nn.Module,
    targets: Mapping[str, Target],
    config: GradInitConfig,
    calibration: Calibration,
    runner: nn.Module | None = None,
) -> CalibrationResult:
    """Run the calibration pass, or check and return the saved result that the data are.

    Args:
        model: the base model, with or without adapters; those are disabled for the pass.
        targets: the modules to measure.
        config: the method.
        calibration: data, or a saved result.
        runner: what to call to run the model. Default: the model.

    Returns:
        The result.
    """
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
    with adapters_disabled(model):
        return config.measure(runner or model, modules, calibration, fingerprint)


def base_fingerprint(model: nn.Module, config: GradInitConfig | SpectralConfig) -> dict[str, str]:
    """Hashes of the base weights that an adapter depends on; heads trained anew are left out."""
    hashes = _base_hashes(model)
    heads = set(config.modules_to_save or ())
    return {name: value for name, value in hashes.items() if not heads & set(name.split("."))}


def _base_hashes(model: nn.Module) -> dict[str, str]:
    hashes = model_fingerprint(model, skip=_ADAPTER_PARAMETERS)
    return {name.replace(".token_adapter", ""): value for name, value in hashes.items()}


def _fingerprint(
    model: nn.Module,
    targets: Mapping[str, Target],
    config: GradInitConfig,
    options: Mapping[str, Any],
) -> Fingerprint:
    return Fingerprint(
        statistic=config.statistic,
        weights=_base_hashes(model),
        targets={
            name: [*t.shape, config.n_triplets(offered_rank(t, config))]
            for name, t in targets.items()
            if t.shape is not None
        },
        options={**options, **config.measured_options()},
    )


def _check_complete(result: CalibrationResult) -> None:
    """Refuse a result that lacks, or has damaged, what its fingerprint promises.

    Args:
        result: measured now, or read from a file.

    Raises:
        FingerprintError: naming the first target that is incomplete.
    """
    for name, (_, in_features, rank) in result.fingerprint.targets.items():
        svd = result.triplets.get(name)
        if svd is None and name in result.failures:
            continue
        whole = svd is not None and svd.Vh.shape == (rank, in_features)
        if svd is None or not whole or not all(bool(part.isfinite().all()) for part in svd):
            raise FingerprintError(
                f"the calibration is damaged: {name} should have {rank} finite triplets for "
                f"{in_features} inputs, got {None if svd is None else tuple(svd.Vh.shape)}; "
                "recalibrate."
            )


def _check_failures(
    failures: Mapping[str, str], targets: Mapping[str, Target], config: GradInitConfig
) -> None:
    """Refuse, or warn of, targets that could not be measured.

    Single experts are given a plain start in any case: which of them the data reach is up to the
    router.

    Args:
        failures: reasons by target name.
        targets: all targets.
        config: says what to do.

    Raises:
        CalibrationError: if a layer, or all experts of a parameter, failed and the config says so.
    """
    if not failures:
        return
    reached = {targets[name].adapted for name in targets.keys() - failures.keys()}
    whole = {n: reason for n, reason in failures.items() if targets[n].adapted not in reached}
    if whole and config.uncalibrated == "error":
        of_experts = any(targets[name].expert is not None for name in whole)
        raise CalibrationError(
            f"{config.method} could not calibrate {len(whole)} of its targets ({_listed(whole)}); "
            "calibrate on data that reach them, exclude them, or set uncalibrated='lora' to give "
            f"them a plain LoRA start.{_KERNEL_HINT if of_experts else ''}"
        )
    warnings.warn(
        f"{config.method} gives {len(failures)} targets a plain LoRA start ({_listed(failures)}).",
        stacklevel=2,
    )


def _listed(failures: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in failures.items())


def _rank_note(target: Target, config: GradInitConfig) -> str:
    if target.r == target.requested_r:
        return ""
    if not config.allocates_ranks:
        return f"r lowered from {target.requested_r}"
    return f"r allocated, {target.requested_r} asked for"


def check_step(method: str, loss_before: float, loss_at: Callable[[float], float]) -> StepCheck:
    """Halve a step that raises the loss until halving no longer helps.

    Args:
        method: name for the warning.
        loss_before: loss of the base model.
        loss_at: takes the step at a scale, 1 being the method's, and returns the loss there.

    Returns:
        The losses, and the scale that was taken last.
    """
    scale, loss = 1.0, loss_at(1.0)
    full = loss
    if not full <= loss_before:
        scale, loss = _best_halving(loss_before, full, loss_at)
    if scale < 1:
        warnings.warn(
            f"the step that {method} starts with would raise the loss on the calibration data from "
            f"{loss_before:.4f} to {full:.4f}; it was scaled by {scale:g}, which gives {loss:.4f}. "
            "Calibrate on more data, or set a larger stable_gamma.",
            stacklevel=2,
        )
    return StepCheck(loss_before, loss, scale)


def _best_halving(
    loss_before: float, full: float, loss_at: Callable[[float], float]
) -> tuple[float, float]:
    """Scale and loss of the best of the halvings, which is the last one measured."""
    scale, loss = 1.0, full
    while scale > SMALLEST_STEP:
        previous, scale = loss, scale / 2
        loss = loss_at(scale)
        if previous <= loss_before and not loss < previous:
            # One too far; measuring the one before again leaves it in the layers.
            return 2 * scale, loss_at(2 * scale)
    return scale, loss


def _factors(
    result: CalibrationResult, target: Target, config: GradInitConfig, seed: int
) -> tuple[Tensor, Tensor]:
    triplets = result.triplets[target.name]
    scaling = _scaling(target, config)
    module_seed = zlib.crc32(target.name.encode()) + seed
    A0, B0 = config.factors(triplets, target, scaling, module_seed)
    return A0.float().contiguous(), B0.float().contiguous()


def _scaling(target: Target, config: GradInitConfig) -> float:
    return target.alpha / (math.sqrt(target.r) if config.use_rslora else target.r)


def _line(
    result: CalibrationResult,
    target: Target,
    config: GradInitConfig,
    factors: tuple[Tensor, Tensor] | None,
) -> ModuleReport:
    note = _rank_note(target, config)
    if target.r == 0:
        return ModuleReport(target.name, "none", 0, target.requested_r, None, 0.0, note)
    if factors is None:
        kind = f"{type(target.module).__name__} has no start of this method"
        note = result.failures.get(target.name, kind)
        return ModuleReport(target.name, "lora", target.r, target.requested_r, None, 0.0, note)
    used = result.triplets[target.name].S[: config.n_triplets(target.r)]
    captured = used.double().square().sum().item()
    A0, B0 = factors
    scaling = _scaling(target, config)
    start = scaling * frobenius_of_product(B0, A0)
    norm = torch.linalg.matrix_norm(target.weight()).item()
    return ModuleReport(
        name=target.name,
        method=config.method,
        r=target.r,
        requested_r=target.requested_r,
        captured_energy=min(1.0, captured / result.energy[target.name]),
        start_norm=start / norm if norm else math.inf,
        fallback=note,
        learning_rate=rate_of_start(A0, B0, scaling) if scaling else None,
    )
