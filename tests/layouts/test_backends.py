"""Every method on bases quantised by torchao, HQQ and optimum-quanto; bitsandbytes has its own file.

The packages are optional: what is not installed is skipped.
"""

import functools
import json

import pytest
import torch
from peft import LoraConfig, PeftModel
from torch import nn
from transformers import AutoModelForCausalLM, QuantoConfig, TorchAoConfig

from peft_gradinit import calibrate, load_for_training
from peft_gradinit.errors import CalibrationError, ConfigError, FingerprintError, TargetError
from peft_gradinit.layouts import model_fingerprint, weight_hash
from peft_gradinit.starts.weights import is_quantized, linear_shape, linear_weight
from tests.helpers import logits, pico_llama, quiet, relative_error, token_batches, train_steps
from tests.methods.rows import (
    INFO,
    config_of,
    every_method,
    saved_factors,
    started,
    with_data,
    with_gradients,
)

FLOAT32 = 1e-5
"""Relative error of float32 logits: weights are dequantised to float32 and computed with as such."""

TURNED = 2e-3
"""The same of a start: singular vectors turn by the rounding over the gap to the next value."""

TARGETS = r".*layers.*(_proj)"
"""By name, since PEFT does not count HQQ's layers among `all-linear`."""


def small_llama(seed=0):
    return pico_llama(seed, hidden_size=64, intermediate_size=128)


def linears_of(model):
    return {n: m for n, m in model.named_modules() if n.endswith("_proj")}


def replaced(model, make):
    for name, module in linears_of(model).items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, make(module))
    return model.eval()


def torchao(kind):
    def make(folder, seed=0):
        quantization = pytest.importorskip("torchao.quantization")
        return loaded(folder, TorchAoConfig(getattr(quantization, kind)()), seed)

    return make


def quanto(kind):
    def make(folder, seed=0):
        pytest.importorskip("optimum.quanto")
        return loaded(folder, QuantoConfig(weights=kind), seed)

    return make


def loaded(folder, config, seed):
    """As users load it."""
    small_llama(seed).save_pretrained(folder / f"float{seed}")
    options = {"quantization_config": config, "dtype": torch.float32}
    return AutoModelForCausalLM.from_pretrained(folder / f"float{seed}", **options).eval()


def hqq(folder, seed=0):
    """Layer by layer, since transformers 5 does not load HQQ."""
    quantize = pytest.importorskip("hqq.core.quantize")
    config = quantize.BaseQuantizeConfig(nbits=4, group_size=64)
    options = {"compute_dtype": torch.float32, "device": "cpu"}
    return replaced(small_llama(seed), lambda m: quantize.HQQLinear(m, config, **options))


LAYOUTS = {
    "torchao_int8": torchao("Int8WeightOnlyConfig"),
    "torchao_float8": torchao("Float8WeightOnlyConfig"),
    "torchao_dynamic": torchao("Int8DynamicActivationInt8WeightConfig"),
    "hqq": hqq,
    "quanto_int8": quanto("int8"),
    "quanto_int4": quanto("int4"),
    "other_backends": None,
}
BACKENDS = ["torchao_int8", "torchao_float8", "hqq", "quanto_int8", "quanto_int4"]
every_backend = pytest.mark.parametrize("backend", BACKENDS)


@pytest.fixture
def quantized(backend, tmp_path):
    return functools.partial(LAYOUTS[backend], tmp_path)


def dequantized(model):
    """The same function with float32 weights."""

    def make(layer):
        out_features, in_features = linear_shape(layer)
        linear = nn.Linear(in_features, out_features, bias=False)
        linear.weight = nn.Parameter(linear_weight(layer).clone(), requires_grad=False)
        return linear

    return replaced(model, make)


def on(model, method, **options):
    return started(method, model, **{"target_modules": TARGETS, **options})


# The weight --------------------------------------------------------------------------------------


@every_backend
def test_the_weight_is_what_the_layer_computes_with(quantized):
    model, plain = quantized(), small_llama()
    for name, layer in linears_of(model).items():
        assert is_quantized(layer)
        weight = linear_weight(layer)
        assert weight.dtype == torch.float32
        assert tuple(weight.shape) == linear_shape(layer) == linear_shape(linears_of(plain)[name])
        x = torch.randn(5, weight.shape[1])
        assert relative_error(layer(x), x @ weight.T) < FLOAT32
        assert 1e-4 < relative_error(weight, linears_of(plain)[name].weight) < 0.2


@every_backend
def test_fingerprints_tell_quantised_weights_apart(quantized):
    model = quantized()
    before = model_fingerprint(model, ())
    assert before == model_fingerprint(quantized(), ())
    logits(model)
    assert before == model_fingerprint(model, ())
    other = model_fingerprint(quantized(seed=1), ())
    changed = {n for n, value in before.items() if other[n] != value}
    assert {n.rpartition(".")[0] for n in before if "_proj" in n} <= {
        n.rpartition(".")[0] for n in changed
    }


@every_backend
def test_a_hash_is_of_the_codes_and_the_scales(backend, quantized, monkeypatch):
    layer = quantized().model.layers[0].mlp.up_proj
    if backend == "hqq":  # older Transformers give HQQ's layers an empty weight
        monkeypatch.setattr(type(layer), "weight", torch.empty(0), raising=False)
    before = weight_hash(layer)
    if backend == "hqq":
        scales = layer.meta["scale"]
    else:
        names = layer.weight.__tensor_flatten__()[0]
        scales = getattr(layer.weight, next(n for n in names if "scale" in n))
    scales.mul_(2)
    assert weight_hash(layer) != before


# The start ---------------------------------------------------------------------------------------


@every_backend
@every_method
def test_the_start_is_that_of_the_dequantised_base(method, quantized, tmp_path):
    got = saved_factors(on(quantized(), method), tmp_path / "quantised")
    want = saved_factors(on(dequantized(quantized()), method), tmp_path / "float")
    assert got.keys() == want.keys()
    assert 7 <= len(got) <= 14  # EVA's allocation leaves layers out
    for layer, pair in got.items():
        for one, other in zip(pair, want[layer], strict=True):
            assert one.shape == other.shape, layer
            assert (one - other).norm() / other.norm().clamp_min(1e-6) <= TURNED, layer


@every_backend
@every_method
def test_the_base_is_kept_and_the_adapter_trains(method, quantized):
    peft_model = on(quantized(), method)
    base = logits(quantized())
    kept = relative_error(logits(peft_model), base) <= FLOAT32
    assert kept == INFO[method].preserves_output
    losses = train_steps(peft_model, n=7)
    if method != "svfit":  # whose few numbers need a larger rate
        assert losses[-1] < losses[0]  # three batches: the last is the first
    assert relative_error(logits(peft_model), base) > 10 * FLOAT32
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), base)


@every_backend
@every_method
def test_a_saved_adapter_comes_back_plain_and_live(method, quantized, tmp_path):
    peft_model = on(quantized(), method, name="other")
    train_steps(peft_model)
    peft_model.save_pretrained(tmp_path)
    saved = tmp_path / "other"
    assert json.loads((saved / "adapter_config.json").read_text())["peft_type"] == "LORA"
    plain = PeftModel.from_pretrained(quantized(), saved)
    assert type(plain.peft_config["default"]) is LoraConfig
    live = load_for_training(quantized(), saved)
    assert type(live.peft_config["default"]) is INFO[method]
    for again in (plain, live):
        assert relative_error(logits(again), logits(peft_model)) < FLOAT32
    with pytest.raises(FingerprintError, match="other"):
        load_for_training(quantized(seed=1), saved)


@every_backend
@with_data
def test_the_report_measures_against_the_dequantised_weight(method, quantized):
    got = on(quantized(), method).base_model.init_report["default"].modules
    want = on(dequantized(quantized()), method).base_model.init_report["default"].modules
    assert len(got) == 14
    for line, other in zip(got, want, strict=True):
        assert line.name == other.name
        assert line.start_norm == pytest.approx(other.start_norm, rel=TURNED)


@every_backend
@with_data
def test_a_saved_calibration_is_of_one_quantised_base(method, quantized, tmp_path):
    config = config_of(method, target_modules=TARGETS)
    path = str(calibrate(quantized(), config, quiet(token_batches())).save(tmp_path / "saved"))
    used = on(quantized(), method, calibration=path)
    assert all(p.isfinite().all() for p in used.parameters() if p.requires_grad)
    with pytest.raises(FingerprintError, match="is of another model weight"):
        on(quantized(seed=1), method, calibration=path)


@every_backend
def test_svfit_computes_its_basis_again_and_does_not_merge(quantized, tmp_path):
    peft_model = on(quantized(), "svfit", save_format="compact")
    train_steps(peft_model)
    peft_model.save_pretrained(tmp_path / "saved")
    again = load_for_training(quantized(), tmp_path / "saved")
    assert relative_error(logits(again), logits(peft_model)) < FLOAT32
    with pytest.raises(ConfigError, match="cannot take in an adapter without being quantised anew"):
        peft_model.merge_adapter()


# What is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["quanto_int8", "quanto_int4"])
@with_data
def test_quanto_does_not_take_in_an_adapter(method, quantized):
    """PEFT's merge would leave the weight as it was and switch the adapter off."""
    peft_model = on(quantized(), method)
    train_steps(peft_model)
    before = logits(peft_model)
    for merge in (peft_model.merge_adapter, peft_model.merge_and_unload):
        with pytest.raises(ConfigError, match=r"quanto weight of .*q_proj.*unquantised model"):
            merge()
    assert torch.equal(logits(peft_model), before)


@with_gradients
def test_layers_that_pass_no_gradient_on_are_named(method, tmp_path):
    model = LAYOUTS["torchao_dynamic"](tmp_path)
    message = r"layers\.0\.self_attn\.\w+ \(Linear with an Int8Tensor\) gives no gradient to its in"
    with pytest.raises(CalibrationError, match=message):
        on(model, method)
    assert not any("lora" in name for name, _ in model.named_modules())


class Packed(nn.Module):
    """What GPTQ, AWQ, EETQ and AQLM layers have in common: integers, and no weight."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.register_buffer("qweight", torch.zeros(4, 4, dtype=torch.int32))


class FP8Linear(nn.Linear):
    """As Transformers': codes in the weight, and their scales beside it."""

    def __init__(self, linear):
        super().__init__(linear.in_features, linear.out_features, bias=False)
        codes = linear.weight.to(torch.float8_e4m3fn)
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.weight_scale_inv = nn.Parameter(torch.ones(1, 1))


@pytest.mark.parametrize("kind", [Packed, FP8Linear])
@every_method
def test_layers_of_other_backends_are_refused_by_class_name(method, kind):
    model = replaced(small_llama(), kind)
    message = rf"{kind.__name__}" if method == "svfit" else rf"q_proj': '{kind.__name__}'"
    with pytest.raises(TargetError, match=message) as raised:
        on(model, method)
    for supported in ("bitsandbytes", "torchao", "HQQ", "optimum-quanto"):
        assert supported in str(raised.value)
    assert not any("lora" in n or "svfit" in n for n, _ in model.named_modules())
