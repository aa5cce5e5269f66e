"""Measurements on an adapter with its start: drift of the output, loss after the built-in step."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...calibration import base_loss, left_as_found, mean_loss, output_of, own_copy
from ...errors import warn
from ...records import StepCheck
from ...starts import Start, adapter_alone, adapters_disabled

SMALLEST_STEP = 2.0**-8
"""The smallest scale that is tried: below it the step's direction, not its length, is at fault."""


def check_step(method: str, loss_before: float, loss_at: Callable[[float], float]) -> StepCheck:
    """Halve a step that raises the loss above `loss_before` until halving no longer helps.

    `loss_at` takes the step at a scale, 1 for the method's own length, and returns the loss there.
    The scale of the result is the one that was taken last.
    """
    scale, loss = 1.0, loss_at(1.0)
    full = loss
    if not full <= loss_before:
        scale, loss = _best_halving(loss_before, full, loss_at)
    if scale < 1:
        warn(
            f"the step that {method} starts with would raise the loss on the calibration data from "
            f"{loss_before:.4f} to {full:.4f}; it was scaled by {scale:g}, which gives {loss:.4f}. "
            "Calibrate on more data, or set a larger stable_gamma."
        )
    return StepCheck(loss_before, loss, scale)


def _best_halving(
    loss_before: float, full: float, loss_at: Callable[[float], float]
) -> tuple[float, float]:
    """Scale and loss of the best halving, which is also the last one that was taken."""
    scale, loss = 1.0, full
    while scale > SMALLEST_STEP:
        previous, scale = loss, scale / 2
        loss = loss_at(scale)
        if previous <= loss_before and not loss < previous:
            # One halving too far. Taking the step before again writes it into the layers.
            return 2 * scale, loss_at(2 * scale)
    return scale, loss


def checked_step(
    model: nn.Module, adapter_name: str, method: str, start: Start, write: Callable[[float], None]
) -> StepCheck | None:
    """Measure the loss at a start, and halve the step if it raises the loss.

    `write` writes the start with both factors multiplied by a number. Without batches to measure
    the loss on, the result is `None`, with a warning.
    """
    if not start.factors:  # no step is taken
        return None
    replay = start.result.replay if start.result else None
    if replay is None or (replay.custom_loss and start.calibration.loss_fn is None):
        why = "holds no batches" if replay is None else "was made with a loss_fn"
        warn(
            f"the step that {method} starts with is not checked: the saved calibration {why}; pass "
            "the data (and Calibration(…, loss_fn=…)), or check_step=False to do without."
        )
        return None

    def loss_at(scale: float) -> float:
        write(math.sqrt(scale))  # both factors share the scale of their product
        with adapter_alone(model, adapter_name):
            return mean_loss(start.runner or model, replay, start.calibration)

    return check_step(method, base_loss(model, replay), loss_at)


def drift(model: nn.Module, adapter_name: str, start: Start) -> float | None:
    """`|y - y0| / |y0|` of the output on the first sequence; `None` if that cannot be measured."""
    probe, calibration = start.result.probe if start.result else None, start.calibration
    runner = start.runner or model
    if probe is None:
        return None
    with left_as_found(runner, None, calibration.seed), torch.no_grad():
        try:
            with adapters_disabled(model, adapter_name):
                base = _output(runner, probe, calibration.loss_fn)
            with adapter_alone(model, adapter_name):
                started = _output(runner, probe, calibration.loss_fn)
        except Exception:  # noqa: BLE001 whatever the user's code may raise on one sequence
            return None  # the drift is a number in the report, no reason to fail
    if base.isfinite().all() and not started.isfinite().all():
        warn(
            "the model's output is finite, and with the start of the adapter it is not; do not train "
            "it. With use_dora=True a row of zeros in an adapted weight does that, as a padded "
            "vocabulary has; leave such layers out of the targets."
        )
    return ((started - base).norm() / base.norm().clamp_min(1e-30)).item()


def _output(model: nn.Module, batch: Any, loss_fn: Any) -> Tensor:
    """The first tensor that the model returns besides a loss; with a `loss_fn`, its loss."""
    if loss_fn is not None:
        loss = loss_fn(model, own_copy(batch))
        return (loss[0] if isinstance(loss, tuple) else loss).float()
    output = output_of(model, batch)
    values = [output] if isinstance(output, Tensor) else output
    values = output.values() if isinstance(output, Mapping) else values
    tensors = [v for v in values if isinstance(v, Tensor) and v.dim() > 0]
    return (tensors or [next(iter(values))])[0].float()
