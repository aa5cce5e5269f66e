"""The loss of a batch: the model's own, or the user's."""

import math
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import Tensor, nn

from ..errors import CalibrationError, DataError
from .guards import left_as_found
from .layouts import must_run_equally
from .processes import Processes, processes
from .replay import Replay
from .spec import Calibration
from .tokens import loss_weight


def base_loss(replay: Replay) -> float:
    """Mean loss of the base model on the batches of a replay, of all processes."""
    with _processes_of(replay) as world:
        loss_sum, weight = world.total(replay.loss_sum, sum(replay.weights))
    return loss_sum / weight


def mean_loss(model: nn.Module, replay: Replay, calibration: Calibration) -> float:
    """Mean loss of the model, as it is now, on the batches of a replay, of all processes.

    Args:
        model: the model, with whatever adapters are active; left as it was found.
        replay: the batches.
        calibration: gives the loss.

    Returns:
        The loss, weighted as in the pass.
    """
    loss_sum = 0.0
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with _processes_of(replay) as world:
        runs = len(replay.batches)
        if must_run_equally(model, calibration):
            runs = max(world.gather(runs))
        with world.together(), left_as_found(model, None, calibration.seed), torch.no_grad():
            for i in range(runs):
                batch = send_to_device(replay.batches[min(i, len(replay.batches) - 1)], device)
                loss, _ = loss_and_weight(model, batch, calibration)
                if i < len(replay.batches) and replay.weights[i]:
                    loss_sum += float(loss) * replay.weights[i]
        loss_sum, weight = world.total(loss_sum, sum(replay.weights))
    return loss_sum / weight


def _processes_of(replay: Replay) -> AbstractContextManager[Processes]:
    return processes() if replay.of_one_process else nullcontext(Processes())


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
