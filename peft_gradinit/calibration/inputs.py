"""From a model and data to the principal components of each target's inputs, by forwards alone."""

import dataclasses
import math
import time
from collections.abc import Callable, Mapping

from torch import Tensor, nn

from ..errors import CalibrationError
from ..linalg import Components, TruncatedSVD, explained_share
from ..statistics import Fingerprint, InputStatistic, TestMatrixPool, input_statistic
from .experts import Measurable, why_unreached
from .forwards import Forwards
from .processes import processes
from .reduction import factored
from .result import CalibrationResult, PassFacts
from .resume import Resume
from .sharing import SharedInputs
from .spec import Calibration

STATISTIC = "inputs"


def measure_inputs(
    model: nn.Module,
    modules: Mapping[str, Measurable],
    calibration: Calibration,
    fingerprint: Fingerprint,
    *,
    centered: bool = True,
    use_labels: bool = True,
    stop_when_settled: float | None = None,
) -> CalibrationResult:
    """Run a forward-only pass and find the components of each module's inputs.

    No loss is computed and no labels are needed; the model is left as it was found. `loss_fn`, if
    the calibration has one, is what runs the model.

    Args:
        model: the model to run.
        modules: linear layers and expert weights by name; the names of `fingerprint.targets`.
        calibration: data, budgets, estimator.
        fingerprint: goes into the result; its targets give shape and rank of each module.
        centered: components of `x - mean`, else of `x`.
        use_labels: take only tokens that carry loss, where batches have labels for each token.
        stop_when_settled: end the pass when, in every layer, the components of one orientation of
            the sketches explain this share of what those of the next one explain. `None`: never
            before the budget or the data end.

    Returns:
        For every module whose inputs vary, triplets without `U` (`(0, rank)`): `S` is the root mean
        square of the inputs along each component, so that `S^2 / energy` is the explained share.

    """
    started = time.perf_counter()
    shared = _empty(fingerprint, calibration, centered)
    settling = _Settling(fingerprint, stop_when_settled)
    with processes() as world:
        resume = Resume(calibration.checkpoint, fingerprint, world)
        forwards = Forwards(
            model,
            shared,
            calibration,
            use_labels=use_labels,
            settled=settling,
            resume=resume,
            world=world,
        )
        facts = forwards.run(modules)
        measured = {name: shared[name] for name in fingerprint.targets}
        energy, failures = _judge(measured, modules, facts)
        energy, failures = world.gather((energy, failures))[0]
        names = [name for name in fingerprint.targets if name not in failures]
        triplets = factored(names, _factoring(shared, fingerprint), world)
        resume.done()
    return CalibrationResult(
        triplets=triplets,
        energy=energy,
        failures=failures,
        fingerprint=fingerprint,
        facts=dataclasses.replace(facts, seconds=time.perf_counter() - started),
        probe=forwards.probe,
        options=dataclasses.replace(calibration, data=()),
    )


def _empty(fingerprint: Fingerprint, calibration: Calibration, centered: bool) -> SharedInputs:
    """One empty accumulator for all layers of the same input dimension and rank."""
    pool = TestMatrixPool()
    kinds: dict[tuple[int, int], InputStatistic] = {}
    for _, in_features, rank in fingerprint.targets.values():
        if (in_features, rank) not in kinds:
            kinds[in_features, rank] = input_statistic(
                in_features,
                rank=min(rank, in_features),
                estimator=calibration.estimator,
                sketch_size=calibration.sketch_size,
                seed=calibration.seed,
                pool=pool,
                centered=centered,
            )
    return SharedInputs({
        name: kinds[in_features, rank]
        for name, (_, in_features, rank) in fingerprint.targets.items()
    })


class _Settling:
    """Asks whether the subspaces of the orientation before still explain what there is to explain.

    In terms of variance, not of angles: components of almost equal variance turn into each other
    for as long as there are data, which changes nothing that matters.
    """

    def __init__(self, fingerprint: Fingerprint, share: float | None) -> None:
        self._ranks = {n: min(rank, dim) for n, (_, dim, rank) in fingerprint.targets.items()}
        self._share = share
        self.before: dict[str, Tensor] = {}

    def check(self, shared: SharedInputs) -> bool:
        """Whether no layer's subspace moves any more; a layer without tokens may still get some."""
        if self._share is None:
            return False
        components = _Cached()
        now = {name: components(shared[name], shared[name].width) for name in self._ranks}
        before = self.before
        self.before = {name: now[name].Vh[:rank].clone() for name, rank in self._ranks.items()}
        return bool(before) and all(
            shared[name].n_tokens and explained_share(before[name], now[name]) >= self._share
            for name in now
        )


class _Cached:
    """Components of shared statistics, computed once."""

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], Components] = {}

    def __call__(self, statistic: InputStatistic, rank: int) -> Components:
        key = (id(statistic), rank)
        if key not in self._known:
            self._known[key] = statistic.components(rank)
        return self._known[key]


def _judge(
    statistics: Mapping[str, InputStatistic],
    modules: Mapping[str, Measurable],
    facts: PassFacts,
) -> tuple[dict[str, float], dict[str, str]]:
    """Tell usable inputs from those that were never seen, do not vary, or are not finite.

    Args:
        statistics: filled, by module name.
        modules: what they are of.
        facts: of the pass.

    Returns:
        Variances, and reasons against those that cannot be used.

    Raises:
        CalibrationError: if inputs are not finite.
    """
    energy, failures = {}, {}
    for name, statistic in statistics.items():
        energy[name] = statistic.variance()
        if not math.isfinite(energy[name]):
            raise CalibrationError(
                f"the inputs of {name} are not finite (variance {energy[name]}); calibrate in "
                "bfloat16 or float32, or on other data."
            )
        if statistic.n_calls == 0:
            failures[name] = why_unreached(modules[name], facts.n_batches)
        elif statistic.n_tokens == 0:
            failures[name] = f"none of its tokens carries loss in {facts.n_batches} batches"
        elif energy[name] == 0.0:
            kind = "constant" if statistic.centered else "zero"
            failures[name] = f"its inputs are {kind} over {statistic.n_tokens} tokens"
    return energy, failures


def _factoring(shared: SharedInputs, fingerprint: Fingerprint) -> Callable[[str], TruncatedSVD]:
    """A function from a layer's name to its components, computed once for layers that share."""
    components = _Cached()

    def triplets_of(name: str) -> TruncatedSVD:
        _, in_features, rank = fingerprint.targets[name]
        found = components(shared[name], min(rank, in_features))
        return TruncatedSVD(
            found.Vh.new_zeros(0, len(found.variance)), found.variance.sqrt(), found.Vh
        )

    return triplets_of
