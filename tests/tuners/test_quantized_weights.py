"""bitsandbytes repacks 4-bit weights in place on a CPU; who a model is does not depend on it."""

import pytest
import torch
from torch import nn

from peft_gradinit.layouts import model_fingerprint, stored_weight
from peft_gradinit.starts.weights import is_quantized, linear_weight
from tests.helpers import logits, pico_llama

bnb = pytest.importorskip("bitsandbytes")


def quantized(bits):
    """A pico Llama whose MLPs are quantised as `from_pretrained` would; the same every time."""
    model = pico_llama(hidden_size=64, intermediate_size=128)
    for layer in model.model.layers:
        for name in ("gate_proj", "up_proj", "down_proj"):
            old = getattr(layer.mlp, name)
            options = {"bias": False, "compute_dtype": torch.float32, "quant_type": "nf4"}
            if bits == 8:
                options = {"bias": False, "has_fp16_weights": False}
            kind = bnb.nn.Linear4bit if bits == 4 else bnb.nn.Linear8bitLt
            new = kind(old.in_features, old.out_features, **options)
            new.load_state_dict({"weight": old.weight.detach()})
            setattr(layer.mlp, name, new.to("cpu"))
    return model.eval()


@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*")
@pytest.mark.parametrize("bits", [4, 8])
def test_fingerprint_and_weight_survive_an_evaluation(bits):
    model = quantized(bits)
    layer = model.model.layers[0].mlp.up_proj
    before = model_fingerprint(model, skip=())
    W = linear_weight(layer).clone()
    logits(model)
    packed = layer.weight.detach().clone()
    assert model_fingerprint(model, skip=()) == before
    assert torch.equal(layer.weight, packed)  # looking at it does not unpack it
    assert (linear_weight(layer) - W).abs().max() <= 2**-7 * W.abs().max()
    assert model_fingerprint(quantized(bits), skip=()) == before
    assert is_quantized(layer)


def test_plain_weights_are_not_copied():
    layer = nn.Linear(4, 3)
    assert stored_weight(layer) is layer.weight
    assert not is_quantized(layer)
    assert not is_quantized(nn.Identity())
