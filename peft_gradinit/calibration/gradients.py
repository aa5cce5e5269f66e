"""From a model and data to the leading triplets of each target's gradient."""

import dataclasses
import math
import time
from collections.abc import Mapping

from torch import nn

from ..errors import CalibrationError
from ..linalg import TruncatedSVD
from ..statistics import Fingerprint, GradientStatistic, TestMatrixPool, gradient_statistic
from .experts import Measurable, why_unreached
from .processes import processes
from .reduction import factored
from .replay import Replay
from .result import CalibrationResult
from .resume import Resume
from .run import collect
from .spec import Calibration

STATISTIC = "gradient"


def measure_gradients(
    model: nn.Module,
    modules: Mapping[str, Measurable],
    calibration: Calibration,
    fingerprint: Fingerprint,
    *,
    keep_batches: bool = False,
) -> CalibrationResult:
    """Run a pass and factor each module's mean gradient.

    Args:
        model: the model to run.
        modules: linear layers and expert weights by name; the names of `fingerprint.targets`.
        calibration: data, budgets, estimator.
        fingerprint: goes into the result; its targets give shape and rank of each module.
        keep_batches: keep the first batches in the result, see `Replay`.

    Returns:
        The triplets of every module whose gradient is not zero, and the reasons for the others.

    """
    started = time.perf_counter()
    statistics = _empty(fingerprint, calibration)
    replay = Replay(custom_loss=calibration.loss_fn is not None) if keep_batches else None
    on_batch = replay.keep if replay else None
    with processes() as world:
        resume = Resume(calibration.checkpoint, fingerprint, world, replay)
        facts, probe = collect(
            model, modules, statistics, calibration, on_batch, world, resume=resume
        )
        if replay is not None:
            replay.of_one_process = world.size > 1
        energy, failures = world.gather(_judge(statistics, modules, facts.n_batches))[0]

        def triplets_of(name: str) -> TruncatedSVD:
            statistic = statistics.pop(name)  # popped: its memory goes before the next one
            svd = statistic.triplets(fingerprint.targets[name][2])
            energy[name] = statistic.energy(svd)
            return svd

        names = [name for name in fingerprint.targets if name not in failures]
        triplets = factored(names, triplets_of, world)
        for rank, theirs in enumerate(world.gather(energy)):
            energy |= {name: theirs[name] for name in names[rank :: world.size]}
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


def _empty(fingerprint: Fingerprint, calibration: Calibration) -> dict[str, GradientStatistic]:
    """An empty accumulator for every target; layers of one dimension share test matrices."""
    pool = TestMatrixPool()
    return {
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


def _judge(
    statistics: Mapping[str, GradientStatistic],
    modules: Mapping[str, Measurable],
    n_batches: int,
) -> tuple[dict[str, float], dict[str, str]]:
    """Tell usable gradients from those that were never seen, are zero, or are not finite.

    Args:
        statistics: filled, by module name.
        modules: what they are of.
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
            reason = why_unreached(modules[name], n_batches)
            failures[name] = f"{reason}, or the loss does not use it"
        elif energy[name] == 0.0:
            failures[name] = f"its gradient is zero over {n_batches} batches"
    return energy, failures
