"""A backend of `torch.distributed` that sends tensors of the stand-in alone, as NCCL does of CUDA."""

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from tests.devices.backend import NAME

BACKEND = f"{NAME}_ccl"


class DeviceOnly(dist.ProcessGroup):
    """Copies to the CPU, sends by gloo, and copies back."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        self.gloo = dist.ProcessGroupGloo(store, rank, size, timeout)

    def getBackendName(self) -> str:
        return BACKEND

    def allreduce(self, tensors: list[Tensor], options: object = None) -> dist.Work:
        return self._sent(self.gloo.allreduce, tensors, options)

    def broadcast(self, tensors: list[Tensor], options: object = None) -> dist.Work:
        return self._sent(self.gloo.broadcast, tensors, options)

    @staticmethod
    def _sent(collective, tensors: list[Tensor], options: object) -> dist.Work:
        elsewhere = [str(t.device) for t in tensors if t.device.type != NAME]
        if elsewhere:
            raise RuntimeError(f"No backend type associated with device type {elsewhere[0]}")
        copies = [t.cpu() for t in tensors]
        collective(copies, options).wait()
        for tensor, received in zip(tensors, copies, strict=True):
            tensor.copy_(received)
        done = torch.futures.Future()
        done.set_result(tensors)
        return torch._C._distributed_c10d._create_work_from_future(done)


def register() -> None:
    """Make the backend known under the name `BACKEND`."""
    dist.Backend.register_backend(BACKEND, DeviceOnly, devices=[NAME])
