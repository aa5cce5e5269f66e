"""The memory that a pass needs, on the devices where the model is."""

import sys
from typing import Any

import torch
from torch import nn

from ...layouts import execution_device


class MemoryGauge:
    """Measures how far memory in use rises above what it was when the gauge was made.

    On accelerators it is the memory that torch has allocated, over all devices of the model. Torch
    keeps the largest amount since the start of the process, which is not reset here, since it is the
    user's. Where it stays the same, the largest amount at a `sample()` counts: take samples where
    much is held. On the CPU it is the growth of the largest resident memory of the process: 0 if it
    was larger before, or where the system keeps no count (Windows).
    """

    def __init__(self, model: nn.Module) -> None:
        devices = {p.device for p in model.parameters()} | {execution_device(model)}
        self._accelerators = [d for d in devices if d.type not in ("cpu", "meta")]
        self._before = {d: allocated(d) for d in self._accelerators}
        self._largest = dict(self._before)
        self._records = {d: most_allocated(d) for d in self._accelerators}
        self._resident = most_resident()

    def sample(self) -> None:
        """Look at the memory in use now; does not wait for the device."""
        for device in self._accelerators:
            self._largest[device] = max(self._largest[device], allocated(device))

    def growth(self) -> int:
        """Bytes above those at the beginning."""
        if not self._accelerators:
            return max(0, most_resident() - self._resident)
        self.sample()
        for device, record in self._records.items():
            if (new := most_allocated(device)) > record:
                self._largest[device] = new
        return sum(self._largest[d] - self._before[d] for d in self._accelerators)


def allocated(device: torch.device) -> int:
    """Bytes that torch has allocated on an accelerator; 0 where it keeps no count."""
    module: Any = torch.get_device_module(device)
    if device.type == "mps":
        return module.current_allocated_memory()
    return module.memory_allocated(device) if hasattr(module, "memory_allocated") else 0


def most_allocated(device: torch.device) -> int:
    """The most that it was since the start of the process; 0 where torch keeps no record."""
    module: Any = torch.get_device_module(device)
    return module.max_memory_allocated(device) if hasattr(module, "max_memory_allocated") else 0


def most_resident() -> int:
    """The largest resident memory of this process so far; 0 on Windows."""
    if sys.platform == "win32":
        return 0  # no such count there
    import resource  # does not exist on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
