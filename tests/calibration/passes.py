"""Short ways to run a pass, shared by the tests of this folder."""

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from peft_gradinit.calibration import Feed, GradientRecorder, Gradients, LayerStatistics, PassFacts
from peft_gradinit.calibration import measure as measure_need
from peft_gradinit.calibration import run_pass as run_recorder
from peft_gradinit.calibration.resume import Resume
from peft_gradinit.layouts import Processes
from peft_gradinit.statistics import DenseGradient, Fingerprint, SketchedGradient, TestMatrixPool
from tests.helpers import quiet, relative_error

FLOAT32 = 1e-5
"""Relative error between two float32 computations of a gradient that sum in another order."""


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer by name."""
    return {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)}


def shape_of(module: nn.Module) -> tuple[int, int]:
    """`(out, in)`, whichever way round the weight is stored."""
    out_features, in_features = module.weight.shape
    return (
        (in_features, out_features) if isinstance(module, Conv1D) else (out_features, in_features)
    )


def collect(model: nn.Module, modules, statistics, calibration):
    """Fill given gradient statistics by a pass; its facts and the first sequence of the data."""
    layers = LayerStatistics(statistics)
    recorder = GradientRecorder(model, layers, calibration, Gradients(), Processes(), {})
    facts = run_recorder(recorder, modules, Feed(calibration, model), Resume())
    return facts, recorder.probe


def run_pass(
    model: nn.Module, data, modules: dict[str, nn.Module] | None = None, **options
) -> tuple[dict[str, Tensor], PassFacts]:
    """Exact mean gradient of every module by a pass with the dense estimator, and its facts."""
    modules = linears(model) if modules is None else modules
    statistics = {n: DenseGradient(*shape_of(m)) for n, m in modules.items()}
    facts, _ = collect(model, modules, statistics, quiet(data, **options))
    return {n: s.mean() for n, s in statistics.items()}, facts


def gradients(model: nn.Module, data, modules=None, **options) -> dict[str, Tensor]:
    """The first half of `run_pass`."""
    return run_pass(model, data, modules, **options)[0]


def sketches(model: nn.Module, data, rank: int = 4, **options) -> dict[str, Tensor]:
    """Rank-`rank` reconstruction of every module's gradient by the sketch estimator."""
    modules, pool = linears(model), TestMatrixPool()
    statistics = {
        name: SketchedGradient(*shape_of(m), width=56, seed=0, pool=pool)
        for name, m in modules.items()
    }
    collect(model, modules, statistics, quiet(data, **options))
    triplets = {n: s.triplets(rank) for n, s in statistics.items()}
    return {n: (t.U * t.S) @ t.Vh for n, t in triplets.items()}


def measure(model: nn.Module, data, rank: int = 2, need=None, **options):
    """Triplets of the gradient of every linear layer."""
    calibration = quiet(data, **{"estimator": "dense", **options})
    modules = linears(model)
    targets = {n: [*shape_of(m), rank] for n, m in modules.items()}
    fingerprint = Fingerprint("gradient", {}, targets, calibration.measurement_options())
    return measure_need(model, modules, calibration, fingerprint, need or Gradients())


def worst_error(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """Largest relative error over all modules."""
    assert got.keys() == want.keys()
    return max(relative_error(got[n].float(), want[n].float()) for n in want)
