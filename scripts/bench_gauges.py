"""Time, memory and kernels of a piece of code, on the CPU or on an accelerator."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def finished(device: torch.device) -> float:
    """The time once the device has done what it was told to."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


@contextmanager
def kernels_counted(device: torch.device) -> Iterator[list[int]]:
    """Count the kernels of CUDA; other devices leave the list empty."""
    count: list[int] = []
    if device.type != "cuda":
        yield count
        return
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        yield count
        torch.accelerator.synchronize()
    names = [e.name for e in profile.events() if e.device_type.name == "CUDA"]
    count.append(sum(not name.startswith(("Memcpy", "Memset")) for name in names))


@contextmanager
def memory_held(device: torch.device) -> Iterator[list[int]]:
    """Measure the most bytes that torch holds in new tensors at once."""
    peak: list[int] = []
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
        yield peak
        torch.accelerator.synchronize()
        peak.append(torch.accelerator.max_memory_allocated() - before)
        return
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        yield peak
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = [0]
    for event in sorted(events, key=lambda event: event.start_ns()):
        held.append(held[-1] + event.nbytes())
    peak.append(max(held))
