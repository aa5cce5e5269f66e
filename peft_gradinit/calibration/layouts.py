"""How a model's weights are laid out over processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from .spec import Calibration
from .zero3 import gathered, is_partitioned


def is_sharded(model: nn.Module) -> bool:
    """Whether running the model is a collective: all processes must run it equally often.

    Args:
        model: with FSDP1, FSDP2, transformers' native sharding or ZeRO-3, or without.

    Returns:
        `True` if a weight, or a module, is spread over processes.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(isinstance(p, DTensor) or is_partitioned(p) for p in model.parameters())


def must_run_equally(model: nn.Module, calibration: Calibration) -> bool:
    """Whether every process must run the model equally often, also with nothing to add.

    Args:
        model: the model.
        calibration: says whether its loss communicates.

    Returns:
        `True` if a process that runs less often leaves others waiting.
    """
    return is_sharded(model) or calibration.loss_is_collective


def whole(parameter: Any) -> Tensor:
    """The values of a parameter, gathered if it is spread; a collective, which all processes call.

    Args:
        parameter: of any layout.

    Returns:
        A tensor of the parameter's full shape; the parameter itself if it is not spread.
    """
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    return gathered(parameter) if is_partitioned(parameter) else parameter


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Give each process its part of FSDP2's weights back after a block that runs the model.

    The outermost module stays whole after a forward; PEFT would freeze the whole weights, and the
    parts would train.

    Args:
        model: any model.

    Yields:
        Nothing.
    """
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def whole_modules(model: nn.Module, *, write: bool = False) -> Iterator[None]:
    """Gather the parameters that FSDP1 has flattened; of no effect in other layouts.

    Args:
        model: the module that was wrapped first, with its wrapper.
        write: keep what is written to them.

    Yields:
        Nothing.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        with FullyShardedDataParallel.summon_full_params(model, writeback=write):
            yield
    else:
        yield


@torch.no_grad()
def assign(parameter: Tensor, values: Tensor) -> None:
    """Write values into a parameter in place: all of them, or this process's part.

    Args:
        parameter: of any layout but FSDP1's, for which see `whole_modules`.
        values: of the parameter's full shape, the same on every process.
    """
    if isinstance(parameter, DTensor):
        values = values.to(device=parameter.device, dtype=parameter.dtype)
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    parameter.data.copy_(values)


def unwrapped(module: Any) -> Any:
    """The module inside FSDP1's wrapper; the module itself if it has none."""
    return module.module if isinstance(module, FullyShardedDataParallel) else module


def plain_name(name: str) -> str:
    """A parameter's or module's name without what wrappers have put into it."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")
