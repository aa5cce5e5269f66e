"""The loop of a pass that needs forwards alone: no loss, no labels, no graph."""

import inspect
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, DataError
from .batches import first_sequence
from .budget import Budget, Step
from .experts import ExpertWeight, Measurable, Product
from .fingerprint import check_not_meta
from .following import Rows, watched
from .gauges import peak_bytes, progress
from .guards import left_as_found
from .layouts import must_run_equally
from .processes import Processes
from .reduction import keep_on_first, orient_inputs, sum_inputs
from .result import PassFacts
from .resume import Resume
from .selection import TokenSelection
from .shards import steps
from .sharing import SharedInputs
from .spec import Calibration
from .tokens import is_encoder_decoder


class Settling(Protocol):
    """What is asked after each orientation, and what it compares with."""

    before: dict[str, Tensor]

    def check(self, shared: SharedInputs) -> bool:
        """Whether to stop."""
        ...


class Forwards:
    """The loop of a pass that needs no loss, and its state.

    Args:
        model: the model to run.
        shared: accumulators by module name.
        calibration: data and budgets; its `loss_fn`, if any, is what runs the model.
        use_labels: take only tokens that carry loss.
        settled: asked after each orientation whether to stop.
        resume: keeps the unfinished sums.
        world: the processes that share the data.

    Attributes:
        probe: the first sequence of the data as a batch; `None` before `run`.
    """

    def __init__(
        self,
        model: nn.Module,
        shared: SharedInputs,
        calibration: Calibration,
        *,
        use_labels: bool,
        settled: Settling,
        resume: Resume,
        world: Processes,
    ) -> None:
        self.model = model
        self.shared = shared
        self.calibration = calibration
        self.use_labels = use_labels
        self.settled = settled
        self._resume = resume
        self.budget = Budget(calibration)
        self.probe: Any = None
        self.weight = 0
        self.world = world
        self.runs_all = world.size > 1 and must_run_equally(model, calibration)
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._selection: TokenSelection | None = None

    def run(self, modules: Mapping[str, Measurable]) -> PassFacts:
        """Read the data, within the budget, and leave the model as it was found.

        Args:
            modules: linear layers and expert weights by the names of the accumulators.

        Returns:
            The facts of the pass.
        """
        with self.world.together():
            for name, parameter in self.model.named_parameters():
                check_not_meta(name, parameter)
        started, peak = time.perf_counter(), peak_bytes()
        if saved := self._resume.load():
            self._continue(*saved)
        with (
            left_as_found(self.model, self.calibration.data, self.calibration.seed),
            torch.no_grad(),
            _inputs({n: m for n, m in modules.items() if isinstance(m, nn.Module)}, self._sink),
            watched(
                {n: m for n, m in modules.items() if isinstance(m, ExpertWeight)},
                self._see,
                self._rows,
            ),
            progress(self.calibration, self.world) as bar,
        ):
            for step in steps(self.calibration, self.model, self.budget, self.world):
                settled = step.orient and self._orient()
                with self.world.together():
                    self._add(step)
                bar.update(self.budget.n_tokens - bar.n)
                if step.ends_batch and not settled:
                    self._resume.after_batch(self._state)
                if settled:
                    self.budget.stopped_by = "settled"
                    break
        self._finish()
        return PassFacts(
            **self.budget.totals(self.world),
            loss_weight=self.weight,
            loss=None,
            seconds=time.perf_counter() - started,
            state_bytes=sum(s.n_bytes() for s in self.shared.distinct()),
            peak_bytes=max(0, peak_bytes() - peak),
        )

    def _orient(self) -> bool:
        orient_inputs(self.shared, self.device, self.world)
        settled = self.world.gather(self.settled.check(self.shared))[0]
        keep_on_first(self.shared, self.world)
        return settled

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and numbers to continue from, at the end of a batch."""
        tensors, numbers = self.shared.state()
        tensors |= {f"settling.{name}": t for name, t in self.settled.before.items()}
        return tensors, {"budget": self.budget.state(), "weight": self.weight, "shared": numbers}

    def _continue(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:
        """Continue from `_state()` of an earlier process."""
        tensors = {key: tensor.to(self.device) for key, tensor in tensors.items()}
        of_settling = {k: t for k, t in tensors.items() if k.startswith("settling.")}
        self.settled.before = {k.removeprefix("settling."): t for k, t in of_settling.items()}
        self.shared.resume(tensors, numbers["shared"])
        self.budget.resume(numbers["budget"])
        self.weight = numbers["weight"]

    def _add(self, step: Step) -> None:
        selection = TokenSelection(self.model, step.batch, use_labels=self.use_labels)
        counts = step.counts and selection.n_tokens > 0
        if not counts and not self.runs_all:
            return
        if self.probe is None:
            # A loss of the user's may be of several sequences together.
            cut = self.calibration.loss_fn is None
            self.probe = first_sequence(step.batch) if cut else step.batch
        self._selection = selection if counts else None
        try:
            self._forward(step.batch)
        finally:
            self.shared.forget()
        self.weight += selection.n_tokens if counts else 0

    def _sink(self, name: str, x: Tensor) -> None:
        if self._selection is not None:
            with torch.autocast(x.device.type, enabled=False):
                self.shared.add(name, x, self._selection.rows)

    def _rows(self) -> Rows | None:
        """Which tokens count for experts, which are given some of them in another order."""
        return None if self._selection is None else self._selection.rows

    def _see(self, product: Product, out: Tensor) -> Tensor:
        if product.swapped:
            raise CalibrationError(
                f"the inputs of {product.parameter.label} cannot be the start of its lora_A: "
                f"{type(product.parameter.module).__name__} stores it as (experts, in, out) without "
                "saying so by is_transposed, so PEFT puts lora_A at the outputs; use a method that "
                "needs gradients, or leave the parameter out."
            )
        with torch.autocast(out.device.type, enabled=False):
            for name, (rows,) in product.parts(product.x):
                self.shared.add(name, rows, lambda x: x)
        return out

    def _forward(self, batch: Any) -> None:
        accelerator = self.calibration.accelerator
        with accelerator.autocast() if accelerator else nullcontext():
            if self.calibration.loss_fn is not None:
                self.calibration.loss_fn(self.model, batch)
            elif isinstance(batch, Mapping):
                self.model(**_needed(self.model, batch))
            else:
                self.model(*batch) if isinstance(batch, tuple | list) else self.model(batch)

    def _finish(self) -> None:
        """Add up what all processes measured, and tell why it is nothing, if so.

        Raises:
            DataError: if the data are empty, or none of their tokens counts.
        """
        self.budget.check_read(self.calibration.data)
        (self.weight,) = self.world.total(self.weight)
        sum_inputs(self.shared, self.device, self.world)
        if self.weight == 0:
            raise DataError(
                f"no token of the {self.budget.n_sequences} calibration sequences carries loss (all "
                "labels are -100) or all are padding; check the prompt masking and the truncation, "
                "or pass use_label_mask=False."
            )


@contextmanager
def _inputs(
    modules: Mapping[str, nn.Module], sink: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Show the inputs of modules to a sink while the block runs."""

    def hook_of(name: str) -> Callable[..., None]:
        # A forward hook, not a pre-hook: it sees what other pre-hooks made of the input.
        return lambda _, args, kwargs, __: sink(name, next(iter((*args, *kwargs.values()))))

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(hook_of(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _needed(model: nn.Module, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    """Leave labels out, so that no loss is computed, unless the model cannot run without them."""
    model = getattr(model, "_orig_mod", model)
    parameter = inspect.signature(model.forward).parameters.get("labels")
    required = parameter is not None and parameter.default is inspect.Parameter.empty
    if required or is_encoder_decoder(model):
        return batch
    return {name: value for name, value in batch.items() if name != "labels"}
