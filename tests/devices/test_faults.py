"""What failed on an accelerator once: each case with the right value."""

import dataclasses

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn

from peft_gradinit.calibration import Checkpoint
from tests.devices.backend import without
from tests.devices.models import (
    ONE,
    OTHER,
    PLACES,
    measured,
    over_two,
    products,
    started,
    trained,
    wide,
    worst,
)
from tests.helpers import pico_llama, quiet, token_batches
from tests.methods.rows import config_of, every_method, with_data

pytestmark = pytest.mark.slow

NO_EIGH = ("aten::_linalg_eigh",)
"""What MPS has no kernel for."""


@every_method
@pytest.mark.parametrize("place", PLACES)
def test_the_random_state_of_every_device_is_left_as_found(method, place):
    model = PLACES[place](pico_llama())
    for device in (ONE, OTHER):
        torch.rand(3, device=device)
    before = [torch.standin.get_rng_state(device) for device in (ONE, OTHER)]
    started(method, model)
    for device, state in zip((ONE, OTHER), before, strict=True):
        assert torch.equal(torch.standin.get_rng_state(device), state)


class Killed(Exception):  # noqa: N818 a death, not an error
    pass


@with_data
@pytest.mark.parametrize("estimator", ["sketch", "dense"])
def test_a_killed_pass_over_two_devices_continues(method, estimator, tmp_path):
    data = token_batches(24, 2)

    def cut():
        yield from data[:7]
        raise Killed

    checkpoint = Checkpoint(tmp_path / "partial", every_seconds=0)
    want = products(measured(method, over_two(wide()), data, estimator=estimator))
    options = {"estimator": estimator, "checkpoint": checkpoint}
    with pytest.raises(Killed):
        measured(method, over_two(wide()), cut(), **options)
    assert checkpoint.path.exists()
    got = products(measured(method, over_two(wide()), data, **options))
    assert worst(got, want) == 0.0


@every_method
@pytest.mark.parametrize("place", ["one device", "two devices", "CPU offload"])
def test_a_device_without_float64_and_eigh(method, place):
    _, want = started(method, wide())
    with without(*NO_EIGH, float64=False):
        _, got = started(method, PLACES[place](wide()))
    assert worst(got, want) < 1e-3


@every_method
@pytest.mark.parametrize("device", [ONE, OTHER])
def test_the_default_device_is_the_users(method, device):
    _, want = started(method, wide())
    model, config = wide().to(device), config_of(method)
    torch.set_default_device(device)
    try:
        got = trained(get_peft_model(model, config))
    finally:
        torch.set_default_device(None)
    assert worst(got, want) < 1e-3


@every_method
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_is_the_users(method, dtype):
    _, want = started(method, wide())
    model = wide()
    torch.set_default_dtype(dtype)
    try:
        _, got = started(method, model)
    finally:
        torch.set_default_dtype(torch.float32)
    assert worst(got, want) < 1e-6


@dataclasses.dataclass
class Pair:
    """A batch of a kind that libraries do not know."""

    tokens: dict[str, Tensor]
    weights: list[Tensor]
    name: str = "pair"


def pairs() -> list[Pair]:
    return [Pair(batch, [torch.ones(2)]) for batch in token_batches()]


def loss_of_pair(model: nn.Module, batch: Pair) -> Tensor:
    assert batch.name == "pair"
    return model(**batch.tokens).loss * batch.weights[0].mean()


@with_data
def test_batches_that_are_dataclasses_are_moved(method):
    data = pairs()
    _, want = started(method, wide(), data=quiet(data, loss_fn=loss_of_pair))
    _, got = started(method, wide().to(ONE), data=quiet(data, loss_fn=loss_of_pair))
    assert worst(got, want) < 1e-3
    assert data[0].tokens["input_ids"].device.type == "cpu"
