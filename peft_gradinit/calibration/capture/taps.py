"""Capture of layer inputs and output gradients.

A forward hook on each target routes its output through `Tap`, which saves the input the way
autograd saves its own (so checkpointing and offloading work with it) and, in the backward, hands
`(x, dy)` to a callback and passes `dy` on. All taps share a scalar `anchor`, the only tensor for
which the backward computes a gradient. So no weight gradient is computed, no `requires_grad` is
touched, and the graph starts at the first target even when nothing upstream requires a gradient.

Only the backward of `Capture.backward` counts. The user's forward may differentiate on its own, but
not with `create_graph=True`: the second-order part of the gradient does not pass through the taps.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CalibrationError
from ...layouts import whole_features
from .experts import ExpertWeight, Measurable, Product
from .following import watched

Sink = Callable[[Tensor, Any], None]


class Tap(torch.autograd.Function):
    """Identity that hands a callback the layer's input and its output's gradient."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, x: Tensor, anchor: Tensor, sink: Sink) -> Tensor:
        """Return `out`; `detach` shares its storage and survives in-place ops that follow."""
        ctx.save_for_backward(x)
        ctx.sink = sink
        return out.detach()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None, None, None]:
        """Hand over `(x, dy)` and pass `dy` on."""
        (dy,) = grad_outputs
        with torch.autocast(dy.device.type, enabled=False):
            # A layer of a dispatched model may be given its input on another device.
            ctx.sink(ctx.saved_tensors[0].to(dy.device), dy)
        return dy, None, None, None


@dataclasses.dataclass
class Capture:
    """Which modules have run under `capture` so far.

    Attributes:
        anchor: the only tensor for which a gradient is computed.
        tapped: names of the modules that ran with gradients.
        untapped: names of the modules that ran under `torch.no_grad()`.
        in_backward: whether `backward` is running.
    """

    anchor: Tensor
    tapped: set[str]
    untapped: set[str]
    in_backward: bool = False

    def backward(self, loss: Tensor) -> None:
        """Differentiate a loss, and hand over what the modules are given meanwhile."""
        self.in_backward = True
        try:
            loss.backward(inputs=[self.anchor])
        finally:
            self.in_backward = False

    def check(self) -> None:
        """Refuse to differentiate a loss of modules that ran only without gradients.

        Raises:
            CalibrationError: naming the modules.
        """
        if missed := sorted(self.untapped - self.tapped):
            raise CalibrationError(
                f"{', '.join(missed)} ran without gradients inside the calibration pass: the code "
                "around it uses torch.no_grad() or reentrant checkpointing; call "
                "torch.utils.checkpoint with use_reentrant=False, or exclude the module."
            )


@contextmanager
def capture(modules: Mapping[str, Measurable], sinks: Mapping[str, Sink]) -> Iterator[Capture]:
    """Hand each module's inputs and output gradients to its sink while the block runs.

    Sinks have the names of the modules; one call for each use of the module in a backward.
    """
    anchor = torch.zeros((), dtype=torch.float32, device="cpu", requires_grad=True)
    seen = Capture(anchor, set(), set())
    sinks = {name: _of_own_backward(name, sink, seen) for name, sink in sinks.items()}
    experts = {n: m for n, m in modules.items() if isinstance(m, ExpertWeight)}
    handles = []
    try:
        for name, module in modules.items():
            if isinstance(module, ExpertWeight):
                continue
            hook = _forward_hook(name, _of_whole_features(module, sinks[name]), seen)
            # Before other hooks, which may change the output: the tap is for the layer's own.
            handles.append(module.register_forward_hook(hook, with_kwargs=True, prepend=True))
        with watched(experts, _tap_product(sinks, seen)):
            yield seen
    finally:
        for handle in handles:
            handle.remove()


def _of_own_backward(name: str, sink: Sink, seen: Capture) -> Sink:
    """The sink, for the backward of the pass alone."""

    def own(x: Tensor, dy: Any) -> None:
        if torch.is_grad_enabled():  # as it is with create_graph=True
            raise CalibrationError(
                f"the forward or loss_fn differentiates the output of {name} by itself with "
                "create_graph=True (a force field, a gradient penalty); the gradient of such a loss "
                "has a second-order part, which the calibration cannot measure. Use plain LoRA or "
                "PiSSA, or calibrate with a loss_fn that does without."
            )
        if seen.in_backward:
            sink(x, dy)

    return own


def _of_whole_features(module: nn.Module, sink: Sink) -> Sink:
    return lambda x, dy: sink(*whole_features(module, x, dy))


def _kind(module: nn.Module) -> str:
    """The module's class; with its weight's class where that is not a plain one."""
    kind, weight = type(module).__name__, getattr(module, "weight", None)
    if weight is None or type(weight) in (Tensor, nn.Parameter):
        return kind
    return f"{kind} with an {type(weight).__name__}"


def _tap_product(sinks: Mapping[str, Sink], seen: Capture) -> Callable[[Product, Tensor], Tensor]:
    def tap(product: Product, out: Tensor) -> Tensor:
        label = product.parameter.label
        if not torch.is_grad_enabled():
            seen.untapped.add(label)
            return out
        seen.tapped.add(label)
        _check_differentiable(product.x, out, label, product.parameter.module)

        # The rows come back from the backward. Kept here, they would outlive a checkpoint's first forward.
        without_rows = dataclasses.replace(product, x=product.x.new_empty(0))

        def sink(x: Tensor, dy: Tensor) -> None:
            for name, (rows, gradients) in without_rows.parts(x, dy):
                pair = (gradients, rows) if without_rows.swapped else (rows, gradients)
                sinks[name](*pair)

        return Tap.apply(out, product.x, seen.anchor, sink)

    return tap


def _forward_hook(name: str, sink: Sink, seen: Capture) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        x = next(iter((*args, *kwargs.values())))  # `input=` of Linear, `x=` of Conv1D
        if not torch.is_grad_enabled():
            seen.untapped.add(name)
            return None
        seen.tapped.add(name)
        _check_differentiable(x, out, name, module)
        return Tap.apply(out, x, seen.anchor, sink)

    return hook


def check_is_linear(name: str, module: nn.Module, out: Any) -> None:
    """Refuse a layer that returns something else than a tensor (`CalibrationError`)."""
    if not isinstance(out, Tensor):
        raise CalibrationError(
            f"{name} ({_kind(module)}) returns a {type(out).__name__} where a linear layer returns a "
            f"tensor, so it cannot have an adapter; pass exclude_modules=[{name!r}]."
        )


def _check_differentiable(x: Tensor, out: Any, name: str, module: nn.Module) -> None:
    check_is_linear(name, module, out)
    if x.requires_grad and not out.requires_grad:
        raise CalibrationError(
            f"{name} ({_kind(module)}) gives no gradient to its input, so nothing before it can be "
            "calibrated, or trained; use a kernel or quantisation with a backward, such as a "
            "weight-only one."
        )
