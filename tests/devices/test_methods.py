"""Every method on a device does what it does on the CPU, wherever the layers are."""

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_gradinit import CalibrationResult, export_adapter, initialize, load_for_training
from peft_gradinit.layouts import is_offloaded, offloaded_value
from tests.devices.models import (
    ONE,
    OTHER,
    PLACES,
    measured,
    offloaded,
    over_two,
    products,
    started,
    trained,
    wide,
    worst,
)
from tests.helpers import quiet, same_weights, token_batches
from tests.methods.rows import every_method, with_data, with_gradients

pytestmark = pytest.mark.slow

ROUNDING = 2e-3
"""Relative difference of factors whose statistics were added up in another order. They turn where
singular values are near each other."""

every_place = pytest.mark.parametrize("place", PLACES)


def batch() -> dict[str, Tensor]:
    return token_batches(4, 4)[0]


def moved(tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """A batch where the model's first layer runs."""
    hook = getattr(model.get_submodule("base_model.model.model.embed_tokens"), "_hf_hook", None)
    device = next(model.parameters()).device if hook is None else hook.execution_device
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def outputs(model: nn.Module) -> Tensor:
    model.eval()
    with torch.no_grad():
        return model(**moved(batch(), model)).logits.cpu()


def losses(model: nn.Module, n: int = 3) -> list[float]:
    """Of some steps of SGD, whose steps rounding does not turn."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    found = []
    for _ in range(n):
        loss = model(**moved(batch(), model)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(loss.item())
    return found


def stored(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the weights of all linear layers, also of those that wait on the CPU."""
    layers = {n: m for n, m in model.named_modules() if type(m) is nn.Linear and "lora_" not in n}
    return {
        name.replace(".base_layer", "").removeprefix("base_model.model."): (
            offloaded_value(layer, "weight") if is_offloaded(layer) else layer.weight
        )
        .detach()
        .clone()
        for name, layer in layers.items()
    }


@every_method
@every_place
def test_the_start_and_the_training_are_those_of_the_cpu(method, place):
    here, want = started(method, wide())
    model = PLACES[place](wide())
    before = stored(model)
    assert len(before) == 15
    there, got = started(method, model)
    assert worst(got, want) < ROUNDING
    assert torch.allclose(outputs(there), outputs(here), atol=1e-4)
    assert losses(there) == pytest.approx(losses(here), rel=1e-3)
    assert same_weights(before, stored(there))


@every_method
@pytest.mark.parametrize("place", ["the second device", "two devices"])
def test_what_is_saved_loads_on_the_cpu_and_goes_on_on_the_device(method, place, tmp_path):
    adapted, _ = started(method, PLACES[place](wide()))
    losses(adapted)
    want = outputs(adapted)
    adapted.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(wide(), tmp_path)
    assert torch.allclose(outputs(plain), want, atol=1e-4)
    live = load_for_training(PLACES[place](wide()), tmp_path)
    assert torch.allclose(outputs(live), want, atol=1e-4)
    assert losses(live) == pytest.approx(losses(adapted), rel=1e-3)


@every_method
@pytest.mark.parametrize("target", ["peft", "serving", "merged"])
def test_exports_are_the_function(method, target, tmp_path):
    adapted, _ = started(method, over_two(wide()) if target != "merged" else wide().to(OTHER))
    losses(adapted)
    want = outputs(adapted)
    export_adapter(adapted, tmp_path / "out", target)
    if target == "merged":
        with torch.no_grad():
            got = type(wide()).from_pretrained(tmp_path / "out")(**batch()).logits
    else:
        got = outputs(PeftModel.from_pretrained(wide(), tmp_path / "out"))
    assert torch.allclose(got, want, atol=1e-3)


@with_data
@pytest.mark.parametrize("place", ["two devices", "CPU offload"])
def test_a_deferred_start_is_the_start(method, place):
    options = {"rho": 1.0} if method == "eva" else {}
    _, want = started(method, wide(), **options)
    adapted, _ = started(method, PLACES[place](wide()), data="deferred", **options)
    initialize(adapted, quiet(token_batches()))
    assert worst(trained(adapted), want) < ROUNDING


@with_data
def test_a_deferred_adapter_may_be_moved_before_it_starts(method):
    options = {"rho": 1.0} if method == "eva" else {}
    _, want = started(method, wide(), **options)
    adapted, _ = started(method, wide(), data="deferred", **options)
    initialize(adapted.to(OTHER), quiet(token_batches()))
    assert worst(trained(adapted), want) < ROUNDING


@with_data
@pytest.mark.parametrize("there", [lambda m: m.to(OTHER), over_two, offloaded])
def test_results_move_between_devices(method, there, tmp_path):
    of_cpu = measured(method, wide())
    of_device = measured(method, there(wide()))
    assert worst(products(of_device), products(of_cpu)) < ROUNDING
    of_device.save(tmp_path)
    loaded = CalibrationResult.load(tmp_path)
    starts = [
        started(method, model, data=result)[1]
        for result in (of_device, loaded)
        for model in (wide(), there(wide()), wide().to(ONE))
    ]
    assert all(worst(start, starts[0]) < 1e-5 for start in starts)


@with_gradients
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_bases_start_near_their_start_on_the_cpu(method, dtype):
    _, want = started(method, wide().to(dtype))
    _, got = started(method, wide().to(dtype).to(ONE))
    errors = {n: ((got[n] - w).norm() / w.norm().clamp_min(1e-12)).item() for n, w in want.items()}
    assert sorted(errors.values())[len(errors) // 2] < 0.2  # the CPU rounds in another order
