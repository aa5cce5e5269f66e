"""What a pass says of its memory is what it took, on the devices where the model is."""

import pytest
import torch

from peft_gradinit.calibration.passes.memory import MemoryGauge
from tests.devices.models import ONE, OTHER, measured, over_two, wide
from tests.helpers import pad
from tests.methods.rows import with_data

N_LONG = 60


def long_batches():
    """So long that what a pass holds of them is more than its sums."""
    generator = torch.Generator().manual_seed(0)
    return [
        pad([torch.randint(1, 96, (N_LONG,), generator=generator) for _ in range(8)])
        for _ in range(4)
    ]


def taken(device: str, method: str, model) -> int:
    """What an allocator without an earlier record sees."""
    torch.standin.reset_peak_memory_stats(device)
    before = torch.standin.memory_allocated(device)
    measured(method, model, long_batches())
    return torch.standin.max_memory_allocated(device) - before


@with_data
def test_an_earlier_peak_does_not_hide_what_a_pass_takes(method):
    model = wide().to(ONE)
    want = taken(ONE, method, model)
    filled = torch.zeros(64 * 2**20, device=ONE)
    del filled
    facts = measured(method, model, long_batches()).facts
    # At least what is held where the gauge looks.
    assert max(facts.state_bytes / 2, want / 3) < facts.peak_bytes <= want


@with_data
def test_without_an_earlier_peak_it_is_exact(method):
    model = wide().to(OTHER)
    want = taken(OTHER, method, model)
    torch.standin.reset_peak_memory_stats(OTHER)
    got = measured(method, model, long_batches()).facts.peak_bytes
    assert got == pytest.approx(want, rel=0.2)


def test_all_devices_of_the_model_count():
    model = over_two(wide())
    each = [taken(device, "lora_ga", model) for device in (ONE, OTHER)]
    for device in (ONE, OTHER):
        torch.standin.reset_peak_memory_stats(device)
    got = measured("lora_ga", model, long_batches()).facts.peak_bytes
    assert min(each) > 0
    assert got == pytest.approx(sum(each), rel=0.2)


def test_other_devices_do_not_count():
    gauge = MemoryGauge(wide().to(OTHER))
    held = torch.zeros(64 * 2**20, device=ONE)
    assert gauge.growth() == 0
    of_other = held.to(OTHER)
    assert gauge.growth() == pytest.approx(of_other.numel() * 4, rel=0.05)
