"""Models that DeepSpeed's ZeRO-3 has partitioned (`zero.Init`), while no engine runs them yet."""

import contextlib
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

from torch import Tensor, nn

from ..errors import CalibrationError

_OF_ENGINES = "ds_inflight_param_registry"
"""Attribute of the outermost module while DeepSpeed runs it."""


def is_partitioned(parameter: Any) -> bool:
    """Whether ZeRO-3 holds a part of the parameter on each process."""
    return hasattr(parameter, "ds_id")


def gathered(parameter: Any) -> Tensor:
    """A copy of a partitioned parameter's whole values; a collective."""
    with import_module("deepspeed").zero.GatheredParameters([parameter]):
        return parameter.data.clone()


@contextmanager
def runnable(model: nn.Module) -> Iterator[None]:
    """Make a partitioned model runnable: each layer is gathered when its turn comes.

    DeepSpeed's own hooks do it for the length of the block. They partition every parameter that
    they find. Parameters that were whole, such as an adapter's, are made whole again afterwards.

    Raises:
        CalibrationError: if DeepSpeed runs the model already.
    """
    if not any(is_partitioned(p) for p in model.parameters()):
        yield
        return
    if hasattr(model, _OF_ENGINES):
        raise CalibrationError(
            f"the {type(model).__name__} is inside a DeepSpeed engine, which runs it for its own training "
            "only; calibrate before deepspeed.initialize (with Trainer: before trainer.train(), by "
            "calibration=data or a saved calibration), not at the beginning of training."
        )
    # An optional dependency, which must be there for a model that it has partitioned.
    offloading = import_module("deepspeed.runtime.zero.parameter_offload")
    timer = import_module("deepspeed.utils.timer")
    whole = [(p, set(vars(p))) for p in model.parameters() if not is_partitioned(p)]
    offload = offloading.DeepSpeedZeRoOffload(
        model, timer.NoopTimer(), None, overlap_comm=False, param_persistence_threshold=0
    )
    try:
        yield
    finally:
        # Layers whose inputs need no gradient are not released by the backward.
        offload.param_coordinator.release_and_reset_all(model)
        offload.destroy()
        delattr(model, _OF_ENGINES)
        for parameter, attributes in whole:
            _make_whole(parameter, attributes)
        for module in model.modules():
            _restore_parameters(module)


def _make_whole(parameter: Any, attributes: set[str]) -> None:
    values = gathered(parameter)
    for name in vars(parameter).keys() - attributes:
        delattr(parameter, name)
    parameter.data = values


def _restore_parameters(module: Any) -> None:
    """Put back the module's own dict of parameters, which DeepSpeed has replaced."""
    with contextlib.suppress(AttributeError):
        module._parameters = module._original_parameters
        del module._original_parameters
