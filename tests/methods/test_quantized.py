"""Every method on bases that bitsandbytes stores in 4 and 8 bits, on the CPU."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn

from peft_gradinit import CalibrationResult, calibrate, load_for_training
from peft_gradinit.methods import METHODS
from peft_gradinit.starts.weights import linear_weight
from tests.helpers import logits, pico_llama, quiet, relative_error, token_batches, train_steps
from tests.methods.rows import FLOAT32, INFO, config_of, saved_factors, started

bnb = pytest.importorskip("bitsandbytes")

pytestmark = pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*")

BITS = (4, 8)
every_method = pytest.mark.parametrize("method", [m.name for m in METHODS])
with_data = pytest.mark.parametrize("method", [m.name for m in METHODS if m.needed() != "nothing"])
every_base = pytest.mark.parametrize("bits", BITS)

EVALUATED = {4: 2**-8, 8: FLOAT32}
"""Relative error of logits: evaluated on the CPU, 4-bit layers compute in bfloat16, and packing
rounds their scales to it."""

REFERENCE = {4: 2e-3, 8: 0.1}
"""Relative error of a start against that of the dequantised base. 4-bit layers calibrate in float32;
singular vectors turn by the rounding over the gap to the next value. 8-bit layers round their inputs
to 8 bits as well."""


def small_llama():
    return pico_llama(hidden_size=64, intermediate_size=128)


def linears_of(model):
    layers = model.named_modules()
    return {n: m for n, m in layers if isinstance(m, nn.Linear) and "lm_head" not in n}


def replaced(model, make):
    """The model with `make(linear)` in place of each of its linear layers."""
    for name, module in linears_of(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(module))
    return model.eval()


def quantized(bits):
    """As `from_pretrained` with a `BitsAndBytesConfig` leaves it."""

    def make(linear):
        shape = (linear.in_features, linear.out_features)
        if bits == 4:
            options = {"quant_type": "nf4", "compute_dtype": torch.float32}
            layer = bnb.nn.Linear4bit(*shape, bias=False, **options)
        else:
            layer = bnb.nn.Linear8bitLt(*shape, bias=False, has_fp16_weights=False, threshold=6.0)
        layer.load_state_dict(linear.state_dict())
        return layer

    model = replaced(small_llama(), make).to("cpu")  # quantises
    setattr(model, f"is_loaded_in_{bits}bit", True)
    return model


def evaluated(bits):
    model = quantized(bits)
    logits(model)
    return model


def dequantized(bits):
    """The same function with float32 weights."""

    def make(layer):
        linear = nn.Linear(layer.in_features, layer.out_features, bias=False)
        linear.weight = nn.Parameter(linear_weight(layer), requires_grad=False)
        return linear

    return replaced(quantized(bits), make)


def codes(model):
    """The integers that weights are stored as, in the order of a checkpoint."""
    layers = {n.replace(".base_layer", ""): m for n, m in linears_of(model).items()}
    layers = {n.removeprefix("base_model.model."): m for n, m in layers.items()}
    quantised = {n: copy.deepcopy(m) for n, m in layers.items() if not m.weight.is_floating_point()}
    return {n: m.state_dict()["weight"].flatten() for n, m in quantised.items()}


def packed(model):
    """What a 4-bit base holds right now, packed or not."""
    held = {}
    for name, module in linears_of(model).items():
        state = module.weight.quant_state
        held[name] = (module.weight.data_ptr(), module.weight.shape, state.dtype, state.nested)
        held[f"{name}.scales"] = state.absmax.flatten().tolist()
    return held


def test_the_base_is_quantized_and_evaluating_keeps_its_codes():
    for bits in BITS:
        fresh, after = codes(quantized(bits)), codes(evaluated(bits))
        assert len(fresh) == 14
        assert all(torch.equal(c, after[n]) for n, c in fresh.items())
        assert {c.dtype for c in fresh.values()} == {torch.uint8 if bits == 4 else torch.int8}


# The start ---------------------------------------------------------------------------------------


@every_base
@every_method
def test_the_function_at_step_zero_is_the_bases_iff_promised(method, bits):
    error = relative_error(logits(started(method, quantized(bits))), logits(quantized(bits)))
    assert (error <= EVALUATED[bits]) == INFO[method].preserves_output
    assert error < 0.5


@every_base
@every_method
def test_the_start_is_that_of_the_dequantised_base(method, bits, tmp_path):
    got = saved_factors(started(method, quantized(bits)), tmp_path / "quantised")
    want = saved_factors(started(method, dequantized(bits)), tmp_path / "float")
    assert got.keys() == want.keys()
    for layer, (A, B) in got.items():
        assert A.isfinite().all(), layer
        assert B.isfinite().all(), layer
        for one, other in zip((A, B), want[layer], strict=True):
            assert one.shape == other.shape, layer
            error = (one - other).norm() / other.norm().clamp_min(1e-6)
            assert error <= REFERENCE[bits], (layer, error)


@every_method
def test_gradients_flow_through_a_4_bit_base_after_the_start(method):
    """Packed weights pass no gradient on; the passes must not have packed them."""
    gradients = []
    for make in (quantized, dequantized):
        peft_model = started(method, make(4)).train()
        peft_model(**token_batches()[0]).loss.backward()
        named = peft_model.named_parameters()
        gradients.append({n: p.grad for n, p in named if p.requires_grad})
    assert gradients[0].keys() == gradients[1].keys()
    largest = max(g.norm() for g in gradients[1].values())
    for name, want in gradients[1].items():
        error = (gradients[0][name] - want).norm() / want.norm().clamp_min(1e-6 * largest)
        assert error <= 0.02, (name, error)


# The base ----------------------------------------------------------------------------------------


@every_base
@every_method
def test_base_weights_are_never_written_and_disabled_it_is_the_base(method, bits, tmp_path):
    model = quantized(bits)
    before = codes(model)
    peft_model = started(method, model)
    train_steps(peft_model.train())
    want = logits(quantized(bits))
    assert relative_error(logits(peft_model), want) > 2 * EVALUATED[bits]
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), want)
    peft_model.save_pretrained(tmp_path)
    after = codes(peft_model)
    assert before.keys() == after.keys()
    assert all(torch.equal(c, after[n]) for n, c in before.items())


@pytest.mark.parametrize("make", [quantized, evaluated])
@with_data
def test_a_calibration_leaves_a_4_bit_base_packed_or_not_as_it_was(method, make):
    model = make(4)
    before = packed(model)
    calibrate(model, config_of(method), quiet(token_batches()))
    assert packed(model) == before


@with_data
def test_a_calibration_of_an_evaluated_4_bit_base_is_that_of_a_fresh_one(method):
    results = [
        calibrate(make(4), config_of(method), quiet(token_batches()))
        for make in (quantized, evaluated)
    ]
    assert not any(r.failures for r in results)
    for name, want in results[0].triplets.items():
        got = results[1].triplets[name]
        assert relative_error(got.S, want.S) <= 0.01, name  # packing rounds the scales


# Saved and loaded --------------------------------------------------------------------------------


def trained_and_saved(method, bits, directory, **options):
    peft_model = started(method, quantized(bits), **options)
    train_steps(peft_model.train())
    peft_model.save_pretrained(directory)
    return peft_model.eval()


@every_base
@every_method
def test_plain_peft_loads_it_on_a_fresh_quantized_base(method, bits, tmp_path):
    peft_model = trained_and_saved(method, bits, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "LORA"
    loaded = PeftModel.from_pretrained(quantized(bits), tmp_path)
    assert type(loaded.peft_config["default"]) is LoraConfig
    error = relative_error(logits(loaded), logits(peft_model))
    assert error <= EVALUATED[bits]
    assert relative_error(logits(loaded), logits(quantized(bits))) > 2 * error


@every_base
@every_method
def test_load_for_training_continues_on_a_fresh_quantized_base(method, bits, tmp_path):
    peft_model = trained_and_saved(method, bits, tmp_path)
    restored = load_for_training(quantized(bits), tmp_path)
    assert type(restored.peft_config["default"]) is INFO[method]
    assert relative_error(logits(restored), logits(peft_model)) <= EVALUATED[bits]
    trained, again = (
        {n: p for n, p in model.named_parameters() if p.requires_grad}
        for model in (peft_model, restored)
    )
    assert trained.keys() == again.keys()
    assert all(torch.equal(p, again[n]) for n, p in trained.items())
    # One that was not evaluated: bitsandbytes passes no gradient through packed 4-bit weights.
    lr = 1e-3 if method == "olora" else 1e-2  # its factors are as long as the weight
    losses = train_steps(load_for_training(quantized(bits), tmp_path).train(), n=7, lr=lr)
    assert losses[-1] < losses[0]  # three batches: the last is the first


@every_base
@pytest.mark.parametrize(
    ("measured_on", "used_on"), [(quantized, evaluated), (evaluated, quantized)]
)
@with_data
def test_an_evaluated_base_is_the_same_base(method, measured_on, used_on, bits, tmp_path):
    result = calibrate(measured_on(bits), config_of(method), quiet(token_batches()))
    path = result.save(tmp_path)
    assert isinstance(CalibrationResult.load(path), CalibrationResult)
    peft_model = started(method, used_on(bits), calibration=str(path))
    assert all(p.isfinite().all() for p in peft_model.parameters() if p.requires_grad)


@every_base
@pytest.mark.parametrize(
    ("saved_on", "loaded_on"), [(quantized, evaluated), (evaluated, quantized)]
)
@every_method
def test_an_adapter_saved_on_an_evaluated_base_comes_back(
    method, saved_on, loaded_on, bits, tmp_path
):
    """Without a warning, which would be an error here."""
    options = {"save_format": "compact"} if method == "svfit" else {}
    started(method, saved_on(bits), **options).save_pretrained(tmp_path)
    restored = load_for_training(loaded_on(bits), tmp_path)
    assert type(restored.peft_config["default"]) is INFO[method]
