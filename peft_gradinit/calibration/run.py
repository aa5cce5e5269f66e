"""The loop of the calibration pass."""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, DataError
from ..statistics import GradientStatistic
from .batches import budgeted, first_sequence
from .budget import Budget, Step
from .capture import Capture, capture
from .fingerprint import check_not_meta
from .gauges import peak_bytes, progress
from .guards import left_as_found
from .result import PassFacts
from .resume import Resume
from .spec import Calibration
from .tokens import loss_weight

FLOAT16_LOSS_SCALE = 2.0**12
"""Keeps small gradients of float16 models from underflowing: without it 17 % error, with 2^8 to
2^16 0.1 %, at 2^24 overflow (measured on a small Llama)."""


def collect(
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    statistics: Mapping[str, GradientStatistic],
    calibration: Calibration,
    on_batch: Callable[[Any, float, float], None] | None = None,
    resume: Resume | None = None,
) -> tuple[PassFacts, Any]:
    """Run the data through the model and fill the statistics.

    The model is left as it was found, whatever happens.

    Args:
        model: the model to run; its loss is differentiated.
        modules: linear layers to capture, by name.
        statistics: accumulators by the same names.
        calibration: data, budgets, loss.
        on_batch: called with every sub-batch that counted, its loss and its weight.
        resume: keeps the unfinished sums.

    Returns:
        The facts of the pass, and the first sequence of the data as a batch.

    """
    _check_model(model)
    pass_ = _Pass(model, statistics, calibration)
    pass_.on_batch = on_batch
    if resume is not None and (saved := resume.load()):
        pass_.resume(*saved)
    started, peak = time.perf_counter(), peak_bytes()
    with (
        left_as_found(model, calibration.data, calibration.seed),
        capture(modules, pass_.sinks()) as seen,
        progress(calibration) as bar,
    ):
        bar.update(pass_.budget.n_tokens)  # what another process has read
        for step in budgeted(calibration, model, pass_.budget):
            pass_.run(step, seen)
            bar.update(step.n_tokens)
            if resume is not None and step.ends_batch:
                resume.after_batch(pass_.state)
    pass_.check()
    facts = PassFacts(
        n_batches=pass_.budget.n_batches,
        n_sequences=pass_.budget.n_sequences,
        n_tokens=pass_.budget.n_tokens,
        loss_weight=pass_.weight,
        loss=pass_.loss_sum / pass_.weight,
        seconds=time.perf_counter() - started,
        state_bytes=sum(s.n_bytes() for s in statistics.values()),
        peak_bytes=max(0, peak_bytes() - peak),
        stopped_by=pass_.budget.stopped_by,
    )
    return facts, pass_.probe


class _Pass:
    """State of one pass: sums, and the weight that the sinks apply."""

    def __init__(
        self,
        model: nn.Module,
        statistics: Mapping[str, GradientStatistic],
        calibration: Calibration,
    ) -> None:
        self.model = model
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
            return lambda x, dy: statistic.add(x, dy, self._step_weight / self.scale)

        return {name: sink_of(statistic) for name, statistic in self.statistics.items()}

    def run(self, step: Step, seen: Capture) -> None:
        """Add one sub-batch to every statistic."""
        seen.tapped.clear()
        seen.untapped.clear()
        if step.orient:
            for statistic in self.statistics.values():
                statistic.orient()
        if self.calibration.loss_fn is None and not loss_weight(self.model, step.batch):
            return
        loss, weight = loss_and_weight(self.model, step.batch, self.calibration)
        if weight == 0:
            return
        seen.check()
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

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers to continue from, at the end of a batch."""
        tensors = {
            f"{n}.{k}": t for n, s in self.statistics.items() for k, t in s.tensors().items()
        }
        counts = {n: [s.weight, s.n_calls] for n, s in self.statistics.items()}
        sums = {"weight": self.weight, "loss_sum": self.loss_sum}
        return tensors, {"budget": self.budget.state(), "counts": counts, **sums}

    def resume(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from `state()` of another process."""
        device = next((p.device for p in self.model.parameters()), torch.device("cpu"))
        for name, statistic in self.statistics.items():
            weight, n_calls = numbers["counts"][name]
            own = _entries(tensors, name, device)
            statistic.load_state_dict({**own, "weight": weight, "n_calls": n_calls})
        self.budget.resume(numbers["budget"])
        self.weight, self.loss_sum = numbers["weight"], numbers["loss_sum"]

    def check(self) -> None:
        """Tell why nothing was measured, if so.

        Raises:
            DataError: if the data are empty, or none of them carries loss.
        """
        self.budget.check_read(self.calibration.data)
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


def loss_and_weight(model: nn.Module, batch: Any, calibration: Calibration) -> tuple[Any, float]:
    """The loss of a batch, and the number of terms that it is the mean of.

    Args:
        model: the model to run.
        batch: on its device.
        calibration: gives `loss_fn` and the user's accelerator.

    Returns:
        The loss, unchecked, and its weight.
    """
    accelerator = calibration.accelerator
    with accelerator.autocast() if accelerator else nullcontext():
        if calibration.loss_fn is None:
            return _model_loss(model, batch), loss_weight(model, batch)
        result = calibration.loss_fn(model, batch)
    if isinstance(result, tuple):
        return result[0], _checked_weight(result)
    return result, loss_weight(model, batch)


def _model_loss(model: nn.Module, batch: Any) -> Any:
    if isinstance(batch, Mapping):
        output = model(**batch)
    else:
        output = model(*batch) if isinstance(batch, tuple | list) else model(batch)
    loss = getattr(output, "loss", None)
    if loss is None:
        got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(
            f"{type(model).__name__} returned no loss for a calibration batch of {got}; add "
            "'labels' to the batches (as DataCollatorForLanguageModeling does), or pass "
            "Calibration(data, loss_fn=…)."
        )
    return loss


def _checked_weight(result: tuple[Any, ...]) -> float:
    weight = result[1] if len(result) == 2 else None
    if isinstance(weight, Tensor) and weight.numel() == 1:
        weight = weight.item()
    if not isinstance(weight, int | float) or not 0 <= weight < math.inf:
        got = ", ".join(type(r).__name__ for r in result)
        raise CalibrationError(
            f"loss_fn returned ({got}) with weight {weight!r} where (loss, weight) with a number "
            "of at least 0 is expected; return the scalar loss, or the loss and the number of "
            "tokens that it is the mean of."
        )
    return float(weight)


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
