"""How a model's weights are spread over processes (FSDP1, FSDP2, ZeRO-3, tensor parallelism)."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor, distribute_tensor

from .zero3 import gathered, is_partitioned


def is_sharded(model: nn.Module) -> bool:
    """Whether running the model is a collective: all processes must run it equally often."""
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        return True
    return any(isinstance(p, DTensor) or is_partitioned(p) for p in model.parameters())


def whole(parameter: Any) -> Tensor:
    """The values of a parameter, gathered by all processes if it is spread; else the parameter."""
    if isinstance(parameter, DTensor):
        return parameter.full_tensor()
    return gathered(parameter) if is_partitioned(parameter) else parameter


@contextmanager
def resharded(model: nn.Module) -> Iterator[None]:
    """Shard FSDP2's weights again after a block that runs the model.

    The outermost module stays whole after a forward. PEFT would then freeze the whole weights, and
    the sharded ones would train.
    """
    try:
        yield
    finally:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()


@contextmanager
def whole_modules(model: nn.Module, *, write: bool = False) -> Iterator[None]:
    """Gather the parameters that FSDP1 has flattened, to read or `write`; no effect elsewhere.

    `model` is the module that was wrapped first, with its wrapper.
    """
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        with FullyShardedDataParallel.summon_full_params(model, writeback=write):
            yield
    else:
        yield


@torch.no_grad()
def assign(parameter: Tensor, values: Tensor) -> None:
    """Write whole values into a parameter in place: all of them, or this process's part.

    `values` are the same on every process. For FSDP1 see `whole_modules`.
    """
    if isinstance(parameter, DTensor):
        values = values.to(device=parameter.device, dtype=parameter.dtype)
        values = distribute_tensor(values, parameter.device_mesh, parameter.placements)
    parameter.data.copy_(values)


def unwrapped(module: Any) -> Any:
    """The module inside FSDP1's wrapper; the module itself if it has none."""
    return module.module if isinstance(module, FullyShardedDataParallel) else module


def uncompiled(module: Any) -> Any:
    """The module inside the wrapper of `torch.compile`; the module itself if it has none."""
    return getattr(module, "_orig_mod", module)


def plain_name(name: str) -> str:
    """The name of a parameter or module without the parts that wrappers add."""
    return name.replace("_fsdp_wrapped_module.", "").replace("_orig_mod.", "")
