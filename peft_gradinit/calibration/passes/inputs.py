"""Records the inputs of layers in forward passes alone: no loss, no labels, no graph."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CalibrationError
from ...layouts import uncompiled, whole_features
from ...linalg import Components, explained_share
from ...statistics import in_groups
from ..capture import (
    ArgumentWatch,
    EncoderWatch,
    ExpertWeight,
    Measurable,
    Product,
    Rows,
    check_is_linear,
    encoder_of,
    watched,
)
from ..copying import own_copy
from ..feed import Step, TokenSelection, is_encoder_decoder, model_inside
from .losses import differentiates, output_of
from .recorder import Recorder


class InputRecorder(Recorder):
    """Fills second moments of the inputs, over the tokens that count."""

    computes_loss = False
    _encoder = EncoderWatch(None)
    _rows: Rows | None = None
    """The selection of the tokens that count; `None`: none do."""
    _of_batch: tuple[Mapping[str, Any], Rows] | None = None
    """What the batch that runs has by name, and its selection; `None` if it does not count."""
    _before: Mapping[str, Tensor] = {}
    """Components at the previous orientation, by layer."""

    @contextmanager
    def watching(self, modules: Mapping[str, Measurable]) -> Iterator[None]:  # noqa: D102
        experts = {n: m for n, m in modules.items() if isinstance(m, ExpertWeight)}
        layers = {n: m for n, m in modules.items() if isinstance(m, nn.Module)}
        inputs = _inputs(layers, self._sink)
        two_parts = is_encoder_decoder(self.model)
        self._encoder = EncoderWatch(encoder_of(model_inside(self.model)) if two_parts else None)
        of_experts = watched(experts, self._see, lambda: self._rows)
        arguments = ArgumentWatch(self.model, self._select_of_forward).watching()
        with torch.no_grad(), self._encoder.watching(), arguments, inputs, of_experts:
            yield

    def add(self, step: Step) -> None:  # noqa: D102
        selection = TokenSelection(self.model, step.batch, use_labels=self.need.use_labels)
        counts = step.counts and selection.n_tokens > 0
        if not counts and not self.runs_all:
            return
        self._keep_probe(step.batch)
        known = step.batch if isinstance(step.batch, Mapping) else {}
        self._rows = self._rows_of(selection) if counts else None
        self._of_batch = None if self._rows is None else (known, self._rows)
        try:
            self._forward(step.batch)
            self.memory.sample()
        except RuntimeError as error:
            if not differentiates(error):
                raise
            raise CalibrationError(
                f"the forward of {type(self.model).__name__} (or loss_fn) differentiates by itself, "
                f"but a pass over inputs runs without gradients ({error}); let it do so under "
                "torch.enable_grad(), or use plain LoRA or PiSSA."
            ) from error
        finally:
            self.layers.forget()
        self.weight += selection.n_tokens if counts else 0

    def _select_of_forward(self, given: Mapping[str, Any]) -> None:
        """Select by what a model is given: the batch may call the masks otherwise, or lack them."""
        if self._of_batch is None:
            return
        known, self._rows = self._of_batch
        tensors = {name: value for name, value in given.items() if isinstance(value, Tensor)}
        if all(known.get(name) is value for name, value in tensors.items()):
            return  # as nearly always: the device is not asked again
        selection = TokenSelection(self.model, {**known, **given}, use_labels=self.need.use_labels)
        self._rows = self._rows_of(selection) if selection.n_tokens else None

    def _rows_of(self, selection: TokenSelection) -> Rows:
        return functools.partial(selection.rows, of_encoder=self._encoder.owns)

    def nothing_counted(self, n_sequences: int) -> str:  # noqa: D102
        return (
            f"no token of the {n_sequences} calibration sequences carries loss (all labels are -100) "
            "or all are padding; check the prompt masking and the truncation, or pass "
            "use_label_mask=False."
        )

    def is_settled(self) -> bool:
        """Whether the components have converged.

        They have if, in every layer, those of the previous orientation still explain the wanted
        share of the current variance. Angles are not compared: components of almost equal variance
        keep turning into each other as long as there are data, which changes nothing that matters.
        """
        groups = self.layers.groups()
        components = in_groups(groups, lambda group: self.layers[group[0]], self._components)
        now = {name: of for group, of in zip(groups, components, strict=True) for name in group}
        before = self._before
        self._before = {n: c.Vh[: self.targets[n][2]].clone() for n, c in now.items()}
        return bool(before) and all(
            self.layers[name].weight
            and explained_share(before[name], now[name]) >= self.need.settle
            for name in now
        )

    def _components(self, groups: list[list[str]]) -> list[Components]:
        statistics = [self.layers[group[0]] for group in groups]
        return [statistic.components(statistic.width) for statistic in statistics]

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:  # noqa: D102
        tensors, numbers = super().state()
        return tensors | {f"before.{name}": t for name, t in self._before.items()}, numbers

    def resume(self, tensors: Mapping[str, Tensor], numbers: Mapping[str, Any]) -> None:  # noqa: D102
        before = {k: t for k, t in tensors.items() if k.startswith("before.")}
        self._before = {k.removeprefix("before."): t for k, t in before.items()}
        super().resume({k: t for k, t in tensors.items() if k not in before}, numbers)

    def _sink(self, name: str, x: Tensor) -> None:
        if self._rows is not None:
            with torch.autocast(x.device.type, enabled=False):
                self.layers.add(name, x, self._rows)

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
                self.layers.add(name, rows, lambda x: x)
        return out

    def _forward(self, batch: Any) -> None:
        accelerator = self.calibration.accelerator
        with accelerator.autocast() if accelerator else nullcontext():
            if self.calibration.loss_fn is not None:
                self.calibration.loss_fn(self.model, own_copy(batch))  # which it may change
            else:
                output_of(self.model, _needed(self.model, batch))


@contextmanager
def _inputs(
    modules: Mapping[str, nn.Module], sink: Callable[[str, Tensor], None]
) -> Iterator[None]:
    """Call a sink with the inputs of modules while the block runs."""

    def hook_of(name: str) -> Callable[..., None]:
        # A forward hook, not a pre-hook: its input has passed through all pre-hooks.
        def hook(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            check_is_linear(name, module, out)
            x, _ = whole_features(module, next(iter((*args, *kwargs.values()))), None)
            sink(name, x)

        return hook

    handles = []
    try:
        for name, module in modules.items():
            handles.append(module.register_forward_hook(hook_of(name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _needed(model: nn.Module, batch: Any) -> Any:
    """Drop labels, so that no loss is computed, unless the model cannot run without them."""
    if not isinstance(batch, Mapping):
        return batch
    model = uncompiled(model)
    parameter = inspect.signature(model.forward).parameters.get("labels")
    required = parameter is not None and parameter.default is inspect.Parameter.empty
    if required or is_encoder_decoder(model):
        return batch
    return {name: value for name, value in batch.items() if name != "labels"}
