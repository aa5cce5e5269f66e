"""The loop of the calibration pass."""

import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, DataError
from ..statistics import GradientStatistic
from .batches import first_sequence
from .budget import Budget, Step
from .capture import Capture, capture
from .experts import Measurable
from .fingerprint import check_not_meta
from .gauges import peak_bytes, progress
from .guards import left_as_found
from .layouts import must_run_equally
from .losses import loss_and_weight
from .processes import Processes
from .reduction import orient_gradients, sum_gradients
from .result import PassFacts
from .resume import Resume
from .shards import steps
from .spec import Calibration
from .tokens import loss_weight

FLOAT16_LOSS_SCALE = 2.0**12
"""Keeps small gradients of float16 models from underflowing: without it 17 % error, with 2^8 to
2^16 0.1 %, at 2^24 overflow (measured on a small Llama)."""


def collect(
    model: nn.Module,
    modules: Mapping[str, Measurable],
    statistics: Mapping[str, GradientStatistic],
    calibration: Calibration,
    on_batch: Callable[[Any, float, float], None] | None = None,
    world: Processes | None = None,
    *,
    resume: Resume | None = None,
) -> tuple[PassFacts, Any]:
    """Run the data through the model and fill the statistics, with those of all processes.

    The model is left as it was found, whatever happens.

    Args:
        model: the model to run; its loss is differentiated.
        modules: linear layers and expert weights to capture, by name.
        statistics: accumulators by the same names.
        calibration: data, budgets, loss.
        on_batch: called with every sub-batch that counted on this process, its loss and weight.
        world: the processes that share the data. Default: this one alone.
        resume: keeps the unfinished sums. Default: they are not kept.

    Returns:
        The facts of the pass, and the first sequence of the data as a batch.

    """
    world, resume = world or Processes(), resume or Resume()
    with world.together():
        _check_model(model)
    pass_ = _Pass(model, statistics, calibration, world)
    pass_.on_batch = on_batch
    if saved := resume.load():
        pass_.resume(*saved)
    started, peak = time.perf_counter(), peak_bytes()
    with (
        left_as_found(model, calibration.data, calibration.seed),
        capture(modules, pass_.sinks()) as seen,
        progress(calibration, world) as bar,
    ):
        for step in steps(calibration, model, pass_.budget, world):
            with world.together():
                pass_.run(step, seen)
            bar.update(pass_.budget.n_tokens - bar.n)
            if step.ends_batch:
                resume.after_batch(pass_.state)
    pass_.finish()
    facts = PassFacts(
        **pass_.budget.totals(world),
        loss_weight=pass_.weight,
        loss=pass_.loss_sum / pass_.weight,
        seconds=time.perf_counter() - started,
        state_bytes=sum(s.n_bytes() for s in statistics.values()),
        peak_bytes=max(0, peak_bytes() - peak),
    )
    return facts, pass_.probe


class _Pass:
    """State of one pass: sums, and the weight that the sinks apply."""

    def __init__(
        self,
        model: nn.Module,
        statistics: Mapping[str, GradientStatistic],
        calibration: Calibration,
        world: Processes,
    ) -> None:
        self.model = model
        self.world = world
        self.runs_all = world.size > 1 and must_run_equally(model, calibration)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.statistics = statistics
        self.calibration = calibration
        self.budget = Budget(calibration)
        self.weight = self.loss_sum = 0.0
        self.probe: Any = None
        self.scale = FLOAT16_LOSS_SCALE if _computes_in_float16(model, calibration) else 1.0
        self.on_batch: Callable[[Any, float, float], None] | None = None
        self._step_weight = 0.0

    def sinks(self) -> dict[str, Any]:
        def sink_of(statistic: GradientStatistic) -> Any:
            def sink(x: Tensor, dy: Tensor) -> None:
                if self._step_weight:
                    statistic.add(x, dy, self._step_weight / self.scale)

            return sink

        return {name: sink_of(statistic) for name, statistic in self.statistics.items()}

    def run(self, step: Step, seen: Capture) -> None:
        """Add one sub-batch to every statistic."""
        seen.tapped.clear()
        seen.untapped.clear()
        if step.orient:
            orient_gradients(self.statistics, self.device, self.world)
        if not self.runs_all and not self._may_count(step):
            return
        loss, weight = loss_and_weight(self.model, step.batch, self.calibration)
        counts = step.counts and weight > 0
        if not counts and not self.runs_all:
            return
        seen.check()
        if not counts and isinstance(loss, Tensor):
            loss, weight = torch.nan_to_num(loss), 0.0
        self._check_loss(loss)
        if self.probe is None:
            # A loss of the user's may be of several sequences together.
            cut = self.calibration.loss_fn is None
            self.probe = first_sequence(step.batch) if cut else step.batch
        self._step_weight = weight
        (loss * self.scale).backward(inputs=[seen.anchor])
        for statistic in self.statistics.values():
            statistic.count(weight)
        self.weight += weight
        self.loss_sum += weight * loss.item()
        if self.on_batch is not None:
            self.on_batch(step.batch, loss.item(), weight)

    def _may_count(self, step: Step) -> bool:
        if not step.counts:
            return False
        return self.calibration.loss_fn is not None or loss_weight(self.model, step.batch) > 0

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers to continue from, at the end of a batch."""
        tensors = {
            f"{n}.{k}": t for n, s in self.statistics.items() for k, t in s.tensors().items()
        }
        counts = {n: [s.weight, s.n_calls] for n, s in self.statistics.items()}
        sums = {"weight": self.weight, "loss_sum": self.loss_sum}
        return tensors, {"budget": self.budget.state(), "counts": counts, **sums}

    def resume(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from `state()` of an earlier process."""
        for name, statistic in self.statistics.items():
            weight, n_calls = numbers["counts"][name]
            own = _entries(tensors, name, self.device)
            statistic.load_state_dict({**own, "weight": weight, "n_calls": n_calls})
        self.budget.resume(numbers["budget"])
        self.weight, self.loss_sum = numbers["weight"], numbers["loss_sum"]

    def finish(self) -> None:
        """Add up what all processes measured, and tell why it is nothing, if so.

        Raises:
            DataError: if the data are empty, or none of them carries loss.
        """
        self.budget.check_read(self.calibration.data)
        self.weight, self.loss_sum = self.world.total(self.weight, self.loss_sum)
        sum_gradients(self.statistics, self.device, self.world)
        if self.weight == 0:
            raise DataError(
                f"all labels of the {self.budget.n_sequences} calibration sequences are -100 (or "
                "loss_fn gave weight 0), so none of their tokens carries loss; check the prompt "
                "masking and the truncation."
            )

    def _check_loss(self, loss: Any) -> None:
        source = "loss_fn" if self.calibration.loss_fn else type(self.model).__name__
        where = f"in calibration batch {self.budget.n_batches}"
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise CalibrationError(
                f"{source} gave {got} {where} where a scalar loss tensor is expected; return "
                "the mean loss, or (loss, weight)."
            )
        if not math.isfinite(value := loss.item()):
            raise CalibrationError(
                f"the loss of {source} is {value} {where}; calibrate on data on which the model "
                "gives a finite loss, or in a wider dtype."
            )
        if not loss.requires_grad:
            raise CalibrationError(
                f"the loss of {source} ({value:.4g}, {where}) has no gradient: it was detached, "
                "computed under torch.no_grad(), or does not depend on any targeted module; return "
                "the loss that training would differentiate."
            )


def _entries(tensors: Mapping[str, Tensor], name: str, device: torch.device) -> dict[str, Tensor]:
    """The tensors of one accumulator: their own names have no dot."""
    parts = {key: key.rpartition(".") for key in tensors}
    return {k: tensors[key].to(device) for key, (n, _, k) in parts.items() if n == name}


def _check_model(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        check_not_meta(name, parameter)
        if parameter.is_inference():
            raise CalibrationError(
                f"{name} was created under torch.inference_mode() and can take part in no backward; "
                "load the model outside inference mode."
            )


def _computes_in_float16(model: nn.Module, calibration: Calibration) -> bool:
    if any(p.dtype == torch.float16 for p in model.parameters()):
        return True
    if getattr(calibration.accelerator, "mixed_precision", None) == "fp16":
        return True
    device = next((p.device.type for p in model.parameters()), "cpu")
    enabled = torch.is_autocast_enabled(device)
    return enabled and torch.get_autocast_dtype(device) == torch.float16
