"""From a model and data to the leading triplets of each target's gradient."""

import dataclasses
import math
import time
from collections.abc import Mapping

from torch import nn

from ..errors import CalibrationError
from ..statistics import Fingerprint, GradientStatistic, TestMatrixPool, gradient_statistic
from .replay import Replay
from .result import CalibrationResult
from .resume import Resume
from .run import collect
from .spec import Calibration

STATISTIC = "gradient"


def measure_gradients(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    calibration: Calibration,
    fingerprint: Fingerprint,
    *,
    keep_batches: bool = False,
) -> CalibrationResult:
    """Run a pass and factor each module's mean gradient.

    Args:
        model: the model to run.
        modules: linear layers by name; the names of `fingerprint.targets`.
        calibration: data, budgets, estimator.
        fingerprint: goes into the result; its targets give shape and rank of each module.
        keep_batches: keep the first batches in the result, see `Replay`.

    Returns:
        The triplets of every module whose gradient is not zero, and the reasons for the others.

    """
    started = time.perf_counter()
    pool = TestMatrixPool()
    statistics = {
        name: gradient_statistic(
            (out_features, in_features),
            rank=rank,
            estimator=calibration.estimator,
            sketch_size=calibration.sketch_size,
            seed=calibration.seed,
            pool=pool,
        )
        for name, (out_features, in_features, rank) in fingerprint.targets.items()
    }
    replay = Replay() if keep_batches else None
    on_batch = replay.keep if replay else None
    resume = Resume(calibration.checkpoint, fingerprint)
    facts, probe = collect(model, modules, statistics, calibration, on_batch, resume)
    energy, failures = _judge(statistics, facts.n_batches)
    triplets = {}
    for name, (_, _, rank) in fingerprint.targets.items():
        if name in failures:
            continue
        statistic = statistics.pop(name)  # popped: its memory goes before the next one
        triplets[name] = statistic.triplets(rank)
        energy[name] = statistic.energy(triplets[name])
    resume.done()
    return CalibrationResult(
        triplets=triplets,
        energy=energy,
        failures=failures,
        fingerprint=fingerprint,
        facts=dataclasses.replace(facts, seconds=time.perf_counter() - started),
        probe=probe,
        replay=replay if replay and replay.batches else None,
        options=dataclasses.replace(calibration, data=()),
    )


def _judge(
    statistics: Mapping[str, GradientStatistic], n_batches: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Tell usable gradients from those that were never seen, are zero, or are not finite.

    Args:
        statistics: filled, by module name.
        n_batches: that they were filled from.

    Returns:
        Squared norms, and reasons against those that cannot be used.

    Raises:
        CalibrationError: if a gradient is not finite.
    """
    energy, failures = {}, {}
    for name, statistic in statistics.items():
        energy[name] = statistic.energy()
        if not math.isfinite(energy[name]):
            raise CalibrationError(
                f"the gradient of {name} is not finite (squared norm {energy[name]}); the loss was, "
                "so its backward overflowed: calibrate in bfloat16 or float32, or on other data."
            )
        if statistic.n_calls == 0:
            failures[name] = f"it never ran in {n_batches} batches, or the loss does not use it"
        elif energy[name] == 0.0:
            failures[name] = f"its gradient is zero over {n_batches} batches"
    return energy, failures
