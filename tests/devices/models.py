"""Models on the stand-in, data of all kinds, and what a calibration of them gives."""

import torch
from accelerate import cpu_offload, dispatch_model
from peft import get_peft_model
from torch import Tensor, nn

from peft_gradinit import CalibrationResult, calibrate
from tests.helpers import pico_llama, quiet, token_batches
from tests.methods.rows import config_of

ONE, OTHER = "standin:0", "standin:1"


def wide() -> nn.Module:
    """A Llama that is wide enough for its statistics to be sketches."""
    return pico_llama(hidden_size=256, intermediate_size=512)


def over_two(model: nn.Module) -> nn.Module:
    """The first half of the model on one device, the second on the other."""
    device_map = {
        "model.embed_tokens": ONE,
        "model.rotary_emb": ONE,
        "model.layers.0": ONE,
        "model.layers.1": OTHER,
        "model.norm": OTHER,
        "lm_head": OTHER,
    }
    return dispatch_model(model, device_map, main_device=ONE)


def offloaded(model: nn.Module) -> nn.Module:
    """The weights on the CPU, each layer computed on the device."""
    return cpu_offload(model, execution_device=torch.device(ONE))


PLACES = {
    "one device": lambda model: model.to(ONE),
    "the second device": lambda model: model.to(OTHER),
    "two devices": over_two,
    "CPU offload": offloaded,
}


def measured(method: str, model: nn.Module, data=None, **options) -> CalibrationResult:
    """A calibration of a method; `options` are those of `Calibration`."""
    data = token_batches(24, 4) if data is None else data
    return calibrate(model, config_of(method, data=None), quiet(data, **options))


def products(result: CalibrationResult) -> dict[str, Tensor]:
    """What does not depend on the signs of singular vectors, on the CPU."""
    found = {}
    for name, parts in result.readouts.items():
        parts = {k: t.cpu() for k, t in parts.items()}
        if "C" in parts:
            found[name] = parts["C"]
            continue
        left = parts["U"] if len(parts["U"]) else parts["Vh"].T
        found[name] = (left * parts["S"]) @ parts["Vh"]
    return found


def started(method: str, model: nn.Module, **options):
    """An adapted model, and its factors on the CPU by name."""
    adapted = get_peft_model(model, config_of(method, **options))
    return adapted, trained(adapted)


def trained(model: nn.Module) -> dict[str, Tensor]:
    """Copies of what trains, on the CPU."""
    return {n: p.detach().cpu().clone() for n, p in model.named_parameters() if p.requires_grad}


def worst(got: dict[str, Tensor], want: dict[str, Tensor]) -> float:
    """The largest relative difference of two sets of tensors of the same names."""
    assert got.keys() == want.keys()
    return max(((got[n] - w).norm() / w.norm().clamp_min(1e-12)).item() for n, w in want.items())
