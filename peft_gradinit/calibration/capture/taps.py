"""Capture of layer inputs and output gradients.

A forward hook on each target routes its output through `Tap`, which saves the input the way
autograd saves its own (so checkpointing and offloading work with it) and, in the backward, hands
`(x, dy)` to a callback and passes `dy` on. All taps share a scalar `anchor`, the only tensor for
which `loss.backward(inputs=[anchor])` computes a gradient. So no weight gradient is computed, no
`requires_grad` is touched, and the graph starts at the first target even when nothing upstream
requires a gradient.
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


@dataclasses.dataclass(frozen=True)
class Capture:
    """Which modules have run under `capture` so far.

    Attributes:
        anchor: to pass to `loss.backward(inputs=[anchor])`.
        tapped: names of the modules that ran with gradients.
        untapped: names of the modules that ran under `torch.no_grad()`.
    """

    anchor: Tensor
    tapped: set[str]
    untapped: set[str]

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
    seen = Capture(torch.zeros((), requires_grad=True), set(), set())
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

        def sink(x: Tensor, dy: Tensor) -> None:
            for name, (rows, gradients) in product.parts(x, dy):
                pair = (gradients, rows) if product.swapped else (rows, gradients)
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


def _check_differentiable(x: Tensor, out: Tensor, name: str, module: nn.Module) -> None:
    if x.requires_grad and not out.requires_grad:
        raise CalibrationError(
            f"{name} ({_kind(module)}) gives no gradient to its input, so nothing before it can be "
            "calibrated, or trained; use a kernel or quantisation with a backward, such as a "
            "weight-only one."
        )
