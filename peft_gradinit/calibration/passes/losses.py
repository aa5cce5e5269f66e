"""The loss of a batch: the model's own, or the user's."""

import inspect
import math
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import CalibrationError, DataError
from ...layouts import Processes, execution_device, processes
from ...numbers import as_python
from ..copying import own_copy
from ..feed import loss_weight, n_sequences, sums_sequences
from ..guards import left_as_found
from ..replay import Replay
from ..spec import Calibration


def base_loss(model: nn.Module, replay: Replay) -> float:
    """Mean loss of the base model on a replay's batches, over all processes."""
    with _processes_of(model, replay) as world:
        loss_sum, weight = world.total(replay.loss_sum, sum(replay.weights))
    return loss_sum / weight


def mean_loss(model: nn.Module, replay: Replay, calibration: Calibration) -> float:
    """Mean loss of the model, with its active adapters, on a replay's batches, over all processes.

    Weighted as in the pass. The model is left as it was found.
    """
    loss_sum = 0.0
    device = execution_device(model)
    with _processes_of(model, replay) as world:
        runs = len(replay.batches)
        if calibration.must_run_equally(model):
            runs = max(world.gather(runs))
        with world.together(), left_as_found(model, None, calibration.seed), torch.no_grad():
            for i in range(runs):
                batch = own_copy(replay.batches[min(i, len(replay.batches) - 1)], device)
                loss = _loss_without_graph(model, batch, calibration)
                if i < len(replay.batches) and replay.weights[i]:
                    loss_sum += float(loss) * replay.weights[i]
        loss_sum, weight = world.total(loss_sum, sum(replay.weights))
    return loss_sum / weight


def _loss_without_graph(model: nn.Module, batch: Any, calibration: Calibration) -> Any:
    """The loss of a batch; with a graph only if the user's code differentiates by itself."""
    try:
        return loss_and_weight(model, batch, calibration)[0]
    except RuntimeError as error:
        if not differentiates(error):
            raise
    with torch.enable_grad():
        return loss_and_weight(model, batch, calibration)[0].detach()


def differentiates(error: RuntimeError) -> bool:
    """Whether an error under `torch.no_grad()` is that of code that differentiates by itself."""
    return "does not require grad" in str(error)


def _processes_of(model: nn.Module, replay: Replay) -> AbstractContextManager[Processes]:
    return processes(model) if replay.of_one_process else nullcontext(Processes())


def loss_and_weight(
    model: nn.Module, batch: Any, calibration: Calibration, known: float | None = None
) -> tuple[Any, float]:
    """The loss of a batch, unchecked, and the number of terms that it is the mean of.

    `known` is that number for the model's own loss, which takes time to count.
    """
    accelerator = calibration.accelerator
    with accelerator.autocast() if accelerator else nullcontext():
        if calibration.loss_fn is None:
            weight = loss_weight(model, batch) if known is None else known
            return _model_loss(model, batch), weight
        result = calibration.loss_fn(model, own_copy(batch))  # which it may change
    if isinstance(result, tuple):
        return result[0], _checked_weight(result)
    return result, loss_weight(model, batch)


def output_of(model: nn.Module, batch: Any) -> Any:
    """The model's output for a batch, which may be a dict, a tuple, a list or a tensor.

    Raises:
        DataError: if the model's forward does not take what the batch holds.
        TypeError: one of the model itself.
    """
    if isinstance(batch, Mapping):
        args, kwargs = (), batch
    else:
        args, kwargs = batch if isinstance(batch, tuple | list) else (batch,), {}
    try:
        return model(*args, **kwargs)
    except TypeError:
        _check_takes(model, args, kwargs)
        raise


def _check_takes(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
    """Name a batch that cannot be the arguments of the model's forward, as `(inputs, labels)`."""
    try:
        signature = inspect.signature(model.forward)
    except (TypeError, ValueError):  # not written in Python
        return
    try:
        signature.bind(*args, **kwargs)
    except TypeError as error:
        got = sorted(kwargs) if kwargs else f"{len(args)} parts"
        raise DataError(
            f"a calibration batch of {got} does not fit {type(model).__name__}.forward{signature}: "
            f"{error}; give batches that hold its arguments by name, with labels, or pass "
            "Calibration(data, loss_fn=lambda model, batch: …), which runs the model itself."
        ) from error


def _model_loss(model: nn.Module, batch: Any) -> Any:
    """The model's own loss, as a mean also where the model gives the sum over the sequences."""
    loss = _loss_of(output_of(model, batch))
    if loss is None:
        got = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise DataError(
            f"{type(model).__name__} returned no loss for a calibration batch of {got}; add "
            "'labels' to the batches (as DataCollatorForLanguageModeling does), or pass "
            "Calibration(data, loss_fn=…)."
        )
    return loss / n_sequences(batch) if sums_sequences(model) else loss


def _loss_of(output: Any) -> Any:
    """The loss in a model's output, where `Trainer` looks for it; `None` if there is none."""
    if isinstance(output, Mapping):
        return output.get("loss")
    if isinstance(output, tuple | list):
        first = output[0] if output else None
        return first if isinstance(first, Tensor) and first.numel() == 1 else None
    return getattr(output, "loss", None)


def _checked_weight(result: tuple[Any, ...]) -> float:
    weight = as_python(result[1]) if len(result) == 2 else None
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
