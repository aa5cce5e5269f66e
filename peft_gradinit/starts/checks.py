"""Checks before a start is written, for damaged results and for targets without a start."""

from collections.abc import Mapping

from torch import Tensor

from ..calibration import CalibrationResult
from ..errors import CalibrationError, FingerprintError, TargetError, first_of, warn
from .config import GradInitConfig
from .target import Target

_KERNEL_HINT = (
    " If a kernel hides the products with the experts, call "
    "model.set_experts_implementation('eager') before."
)


def check_complete(result: CalibrationResult, config: GradInitConfig) -> None:
    """Refuse a result without whole and finite readouts for every target of its fingerprint."""
    for name, (out_features, in_features, size) in result.fingerprint.targets.items():
        found = result.readouts.get(name)
        if found is None and name in result.failures:
            continue
        shape = (out_features, in_features)
        whole = found is not None and config.needs().is_whole(found, shape, size)
        if found is None or not whole or not all(bool(t.isfinite().all()) for t in found.values()):
            got = {part: tuple(t.shape) for part, t in (found or {}).items()}
            what = f"{size} finite triplets" if size else f"finite {config.needs().title}"
            raise FingerprintError(
                f"the calibration is damaged: {name} should have {what} for "
                f"{in_features} inputs, got {got or None}; recalibrate."
            )


def check_failures(
    failures: Mapping[str, str], targets: Mapping[str, Target], config: GradInitConfig
) -> None:
    """Refuse, or warn of, targets that could not be measured; `failures` has reasons by name.

    Single experts get a plain start in any case, since the router decides which experts run.
    Automatic targets that failed as a whole get no adapter.

    Raises:
        CalibrationError: if a layer, or every expert of a parameter, failed and the config says so;
            with automatic targets, if all failed.
    """
    if not failures:
        return
    reached = {targets[name].adapted for name in targets.keys() - failures.keys()}
    whole = {n: reason for n, reason in failures.items() if targets[n].adapted not in reached}
    if config.automatic and reached:
        failures = {name: reason for name, reason in failures.items() if name not in whole}
        whole = {}
        if not failures:
            return
    if whole and config.uncalibrated == "error":
        of_experts = any(targets[name].expert is not None for name in whole)
        raise CalibrationError(
            f"{config.method} could not calibrate {len(whole)} of its targets ({_listed(whole)}); "
            "calibrate on data that reach them, exclude them, or set uncalibrated='lora' to give "
            f"them a plain LoRA start.{_KERNEL_HINT if of_experts else ''}"
        )
    warn(f"{config.method} gives {len(failures)} targets a plain LoRA start ({_listed(failures)}).")


def check_ranks(
    result: CalibrationResult, targets: Mapping[str, Target], config: GradInitConfig
) -> None:
    """Warn if the data have fewer directions than the ranks of a target use.

    A target of full rank is left out: no rows fill the gradient of a router, whose rows sum to zero.
    """
    need, short = config.needs(), list[str]()
    for name, target in targets.items():
        readouts, used = result.readouts.get(name), need.size(target.r)
        if not readouts or used == min(target.shape or (0,)):
            continue
        if (found := need.found(readouts, target.r)) < used:
            short.append(f"{name}: {found} of {used}")
    if short:
        warn(
            f"the calibration found fewer directions than the ranks of {len(short)} targets use "
            f"({first_of(short, '; ')}), and rounding decides on the others; calibrate on more "
            "rows, or lower r."
        )


def _listed(failures: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in failures.items())


def those_that_train(
    factors: dict[str, tuple[Tensor, Tensor]], config: GradInitConfig
) -> dict[str, tuple[Tensor, Tensor]]:
    """Refuse, or leave out with a warning, starts at `A = B = 0`, which no gradient moves."""
    zero = [name for name, (A0, B0) in factors.items() if not A0.any() and not B0.any()]
    if not zero:
        return factors
    starts = f"{config.method} starts {len(zero)} of its targets ({', '.join(zero)}) at A = B = 0"
    if config.uncalibrated == "error":
        raise TargetError(
            f"{starts}, where no gradient moves them, since their weight is zero; exclude them, or "
            "set uncalibrated='lora' to give them a plain LoRA start."
        )
    warn(f"{starts}, since their weight is zero; they get a plain LoRA start.")
    return {name: pair for name, pair in factors.items() if name not in zero}
