"""One pass over the data, for any need: the loop, and the readouts at its end."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ...errors import DataError, GradInitError
from ...layouts import Processes, processes
from ...statistics import Fingerprint, Statistic, in_groups
from ..capture import Measurable, why_unreached
from ..feed import Feed
from ..guards import left_as_found
from ..needs import Estimator, Gradients, Inputs, Measured, SecondMoments
from ..replay import Replay
from ..result import CalibrationResult, PassFacts
from ..resume import Resume
from ..spec import Calibration
from .gradients import GradientRecorder
from .inputs import InputRecorder
from .progress import progress
from .recorder import Recorder
from .reduction import shared_out
from .sharing import LayerStatistics

RECORDERS: Mapping[type[Measured], type[Recorder]] = {
    Gradients: GradientRecorder,
    Inputs: InputRecorder,
    SecondMoments: InputRecorder,
}
"""What fills the statistics of each need."""


def measure(
    model: nn.Module,
    modules: Mapping[str, Measurable],
    calibration: Calibration,
    fingerprint: Fingerprint,
    need: Measured,
) -> CalibrationResult:
    """Run a pass and read off what a method needs of every layer.

    The model is left as it was found, whatever happens.

    Args:
        model: the model to run.
        modules: linear layers and expert weights by name; the names of `fingerprint.targets`.
        calibration: data, budgets, estimator; its `loss_fn`, if any, is what runs the model.
        fingerprint: goes into the result; its targets give shape and rank of each module.
        need: what to measure.

    Returns:
        Readouts of every module that could be measured, and the reasons for the others.
    """
    started = time.perf_counter()
    replay = Replay(custom_loss=calibration.loss_fn is not None) if need.keep_batches else None
    with processes(model) as world:
        resume = Resume(calibration.checkpoint, fingerprint, world, replay)
        recorder = recorder_of(model, calibration, fingerprint, need, world)
        if replay is not None:
            recorder.on_batch, replay.of_one_process = replay.keep, world.size > 1
        feed = Feed(calibration, model, world, computes_loss=recorder.computes_loss)
        facts = run_pass(recorder, modules, feed, resume)
        layers = recorder.layers
        energy, failures = world.gather(_judged(layers, need, modules, facts.n_batches))[0]
        names = [name for name in fingerprint.targets if name not in failures]
        reader = _Reader(layers, need, fingerprint)
        readouts = shared_out(names, reader, world)
        for rank, theirs in enumerate(world.gather(reader.energy)):
            energy |= {name: theirs[name] for name in names[rank :: world.size]}
        resume.done()
    return CalibrationResult(
        readouts=readouts,
        energy=energy,
        failures=failures,
        fingerprint=fingerprint,
        facts=dataclasses.replace(facts, seconds=time.perf_counter() - started),
        need=need,
        probe=recorder.probe,
        replay=replay if replay and replay.batches else None,
        options=dataclasses.replace(calibration, data=()),
    )


def recorder_of(
    model: nn.Module,
    calibration: Calibration,
    fingerprint: Fingerprint,
    need: Measured,
    world: Processes,
) -> Recorder:
    """A recorder with an empty accumulator for every target of the fingerprint.

    Layers of one kind, whose inputs may turn out to be the same, begin with one accumulator; layers
    of one dimension share test matrices.
    """
    estimator = Estimator(calibration.estimator, calibration.sketch_size, calibration.seed)
    kinds: dict[Any, Statistic] = {}
    empty: dict[str, Statistic] = {}
    for name, (out_features, in_features, size) in fingerprint.targets.items():
        kind = name if need.backward else (in_features, size)
        if kind not in kinds:
            kinds[kind] = need.accumulator((out_features, in_features), size, estimator)
        empty[name] = kinds[kind]
    layers = LayerStatistics(empty)
    return RECORDERS[type(need)](model, layers, calibration, need, world, fingerprint.targets)


def run_pass(
    recorder: Recorder, modules: Mapping[str, Measurable], feed: Feed, resume: Resume
) -> PassFacts:
    """The loop: read, orient, add, until the data or the budget end, or the components settle.

    Raises:
        DataError: if the data are empty, or none of them counts.
    """
    world, calibration, budget = recorder.world, recorder.calibration, feed.budget
    with world.together():
        recorder.check_model()
    started = time.perf_counter()
    if saved := resume.load():
        tensors, numbers = saved
        tensors = {key: tensor.to(recorder.device) for key, tensor in tensors.items()}
        recorder.resume(tensors, numbers)
        budget.resume(numbers["feed"])

    def state() -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, numbers = recorder.state()
        return tensors, {**numbers, "feed": budget.state()}

    with (
        left_as_found(recorder.model, calibration.data, calibration.seed),
        recorder.watching(modules),
        progress(calibration, budget, world) as show,
    ):
        for step in feed:
            settled = step.orient and recorder.orient()
            with world.together(), _batch_noted(step.n_batch):
                recorder.add(step)
            show()
            if settled:
                budget.stopped_by = "settled"
                break
            if step.ends_batch:
                resume.after_batch(state)
    budget.check_read(calibration.data)
    recorder.finish()
    if recorder.weight == 0:
        raise DataError(recorder.nothing_counted(budget.n_sequences))
    loss, totals = recorder.loss_sum, budget.totals(world)
    if world.rank == 0:
        budget.check_enough(totals["n_sequences"])
    return PassFacts(
        **totals,
        loss_weight=recorder.weight,
        loss=None if loss is None else loss / recorder.weight,
        seconds=time.perf_counter() - started,
        state_bytes=sum(s.n_bytes() for s in recorder.layers.distinct()),
        peak_bytes=recorder.memory.growth(),
    )


@contextmanager
def _batch_noted(n_batch: int) -> Iterator[None]:
    """Add the number of the batch to an error of the user's code, which stays what it is."""
    try:
        yield
    except Exception as error:
        add_note = getattr(error, "add_note", None)  # Python 3.11
        if add_note is not None and not isinstance(error, GradInitError):
            add_note(f"It was raised in calibration batch {n_batch}.")
        raise


def _judged(
    layers: LayerStatistics, need: Measured, modules: Mapping[str, Measurable], n_batches: int
) -> tuple[dict[str, float], dict[str, str]]:
    """Energies of all layers, and the reasons why some of them cannot be used."""
    energy, failures = {}, {}
    for name, module in modules.items():
        statistic = layers[name]
        energy[name] = statistic.energy()
        unreached = why_unreached(module, n_batches)
        if (reason := need.failure(name, statistic, unreached, n_batches)) is not None:
            failures[name] = reason
    return energy, failures


class _Reader:
    """Reads off each layer's statistic what the need keeps; once for layers that share one.

    `energy` is that of the layers that were read.
    """

    def __init__(self, layers: LayerStatistics, need: Measured, fingerprint: Fingerprint) -> None:
        self.energy: dict[str, float] = {}
        self._layers = layers
        self._need = need
        self._targets = fingerprint.targets

    def __call__(self, names: Sequence[str]) -> dict[str, dict[str, Tensor]]:
        sharing: dict[int, list[str]] = {}
        for name in names:
            sharing.setdefault(id(self._layers[name]), []).append(name)
        groups = list(sharing.values())
        sizes = [self._targets[group[0]][2] for group in groups]
        found = in_groups(groups, lambda group: self._layers[group[0]], self._read, sizes)
        of_name = {name: of for group, of in zip(groups, found, strict=True) for name in group}
        return {name: of_name[name] for name in names}

    def _read(self, groups: list[list[str]]) -> list[dict[str, Tensor]]:
        size = self._targets[groups[0][0]][2]
        # A statistic leaves the layers here, so that its memory goes before others are read.
        statistics = [self._layers.pop(group) for group in groups]
        found = self._need.read_alike(statistics, size)
        for group, statistic, readouts in zip(groups, statistics, found, strict=True):
            self.energy |= dict.fromkeys(group, self._need.energy(statistic, readouts))
        return found
