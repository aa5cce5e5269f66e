"""What every method promises: a method is a row, and one without a row fails."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_gradinit import (
    EvaConfig,
    LoraGAConfig,
    LoraOneConfig,
    SVFitConfig,
    calibrate,
    initialize,
    load_for_training,
)
from peft_gradinit.errors import ConfigError, NotInitializedError
from peft_gradinit.linalg import TruncatedSVD
from peft_gradinit.methods import METHODS
from peft_gradinit.tuners import Target
from tests.helpers import (
    base_weights,
    logits,
    pad,
    pico_gpt2,
    pico_llama,
    quiet,
    relative_error,
    rows_of,
    same_weights,
    token_batches,
    train_steps,
)
from tests.tuners.test_failures import assert_as_before, failing_calibration, snapshot

ROWS = {"lora_ga": LoraGAConfig, "lora_one": LoraOneConfig, "eva": EvaConfig, "svfit": SVFitConfig}
RANK_GROWTH = {"lora_ga": 2}
"""Saved rank over live rank, where it is not 1."""

FLOAT32 = 1e-5
"""Relative error of float32 logits that were computed in another order."""

INFO = {m.name: m for m in METHODS}
WITH_DATA = [m.name for m in METHODS if m.needs != "nothing"]
WITH_GRADIENTS = [m.name for m in METHODS if m.needs == "gradients"]
every_method = pytest.mark.parametrize("method", [m.name for m in METHODS])
with_data = pytest.mark.parametrize("method", WITH_DATA)
with_gradients = pytest.mark.parametrize("method", WITH_GRADIENTS)
every_model = pytest.mark.parametrize(
    "make", [pytest.param(pico_llama, id="llama"), pytest.param(pico_gpt2, id="gpt2-conv1d-tied")]
)


def config_of(method, data=..., **options):
    values = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    if method in WITH_DATA:
        values |= {"lora_alpha": 8, "calibration": quiet(token_batches()) if data is ... else data}
    return ROWS[method](**{**values, **options})


def started(method, model=None, name="default", **options):
    return get_peft_model(model or pico_llama(), config_of(method, **options), name)


def trained(method, model=None, name="default", **options):
    peft_model = started(method, model, name, **options)
    train_steps(peft_model)
    return peft_model


def saved_in(directory, name="default"):
    return directory if name == "default" else directory / name


def saved_factors(peft_model, directory):
    """`(A, B)` by layer, as they stand in the file."""
    peft_model.save_pretrained(directory)
    entries = load_file(directory / "adapter_model.safetensors")
    stems = sorted(k.removesuffix(".lora_A.weight") for k in entries if ".lora_A." in k)
    assert len(entries) == 2 * len(stems)
    return {s: (entries[f"{s}.lora_A.weight"], entries[f"{s}.lora_B.weight"]) for s in stems}


def assert_close(one, other, tolerance):
    assert one.keys() == other.keys()
    for layer, pair in one.items():
        for got, want in zip(pair, other[layer], strict=True):
            assert got.shape == want.shape, layer
            error = (got - want).norm() / want.norm().clamp_min(1e-6)
            assert error <= tolerance, (layer, error)


def test_every_method_has_a_row():
    assert set(ROWS) == {m.name for m in METHODS}
    for m in METHODS:
        assert ROWS[m.name] is m.config
        config = config_of(m.name)
        assert (config.method, config.peft_type.value) == (m.title, m.name.upper())


# What is saved -----------------------------------------------------------------------------------


@every_method
@every_model
def test_the_saved_file_is_a_float32_lora_in_the_layout_of_linear(method, make, tmp_path):
    peft_model = started(method, make())
    factors = saved_factors(peft_model, tmp_path)
    content = json.loads((tmp_path / "adapter_config.json").read_text())
    plain = LoraConfig.from_pretrained(tmp_path)

    assert content["peft_type"] == "LORA"
    assert content.keys() <= LoraConfig().to_dict().keys()
    total = 0
    for layer, (A, B) in factors.items():
        name = layer.removeprefix("base_model.model.")
        module = make().get_submodule(name)
        shape = module.weight.shape
        out_features, in_features = shape[::-1] if isinstance(module, Conv1D) else shape
        r = plain.rank_pattern.get(get_pattern_key(plain.rank_pattern, name), plain.r)
        assert A.shape == (r, in_features), layer
        assert B.shape == (out_features, r), layer
        assert A.dtype == B.dtype == torch.float32
        total += r
    n_targets = {pico_llama: 14, pico_gpt2: 8}[make]
    assert total == RANK_GROWTH.get(method, 1) * 4 * n_targets  # an allocation keeps the sum


# Degenerate statistics ---------------------------------------------------------------------------

SPECTRA = {
    "zero": [0.0] * 8,
    "rank-deficient": [1.0, 0.5, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
    "huge": [1e30, 1e30, 1e29, 1e20, 1.0, 0.0, 0.0, 0.0],
    "tiny": [1e-42, 1e-44, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0],
}


@with_data
@pytest.mark.parametrize("spectrum", SPECTRA)
def test_starts_are_finite_on_degenerate_statistics(method, spectrum):
    U = torch.linalg.qr(torch.randn(12, 8)).Q
    Vh = torch.linalg.qr(torch.randn(16, 8)).Q.T
    triplets = TruncatedSVD(U, torch.tensor(SPECTRA[spectrum]), Vh)
    target = Target("x", nn.Linear(16, 12), (12, 16), 4, 4, 8.0)
    options = [{}, {"whiten": True}] if method == "eva" else [{}]
    for more in options:
        A0, B0 = config_of(method, **more).factors(triplets, target, 2.0, 0)
        assert A0.shape == (4, 16)
        assert B0.shape == (12, 4)
        assert A0.isfinite().all()
        assert B0.isfinite().all()
        assert (B0 @ A0).isfinite().all()


@pytest.mark.parametrize("method", [n for n in INFO if n not in WITH_DATA])
@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("weight", ["zero", "rank-deficient", "huge", "tiny"])
def test_bases_are_finite_on_degenerate_weights(method, weight, svd):
    W = {
        "zero": torch.zeros(12, 16),
        "rank-deficient": torch.outer(torch.randn(12), torch.randn(16)),
        "huge": 1e30 * torch.randn(12, 16),
        "tiny": 1e-42 * torch.randn(12, 16),
    }[weight]
    config = config_of(method, svd=svd)
    U, Vh = config.basis(W, 4, "x")
    torch.testing.assert_close(U.T @ U, torch.eye(4))
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(4))
    A, B = config.factors(U, torch.zeros(4), Vh)
    assert not (B @ A).any()


# What the start is -------------------------------------------------------------------------------


@every_method
@every_model
def test_the_function_at_step_zero_is_the_bases_iff_promised(method, make):
    error = relative_error(logits(started(method, make())), logits(make()))
    assert (error <= FLOAT32) == INFO[method].preserves_output
    assert error < 0.5


@with_data
def test_the_split_into_batches_does_not_matter(method, tmp_path):
    """Dense gradients: a sketch is oriented by the first batches, which differ."""
    rows = rows_of(token_batches())
    found = []
    for size in (1, 5):
        data = [pad(rows[i : i + size], extra=2) for i in range(0, len(rows), size)]
        model = started(method, calibration=quiet(data, estimator="dense"))
        found.append(saved_factors(model, tmp_path / str(size)))
    # Singular vectors turn by the rounding over the gap to the next value, here some hundredths.
    assert_close(*found, tolerance=2e-3)


@with_gradients
def test_the_scale_of_the_loss_does_not_matter(method, tmp_path):
    found = []
    for scale in (1, 1000):
        calibration = quiet(token_batches(), loss_fn=lambda m, b, s=scale: s * m(**b).loss)
        model = started(method, calibration=calibration)
        found.append(saved_factors(model, tmp_path / str(scale)))
    assert_close(*found, tolerance=2e-3)  # as above


def with_linears(model):
    """The same function, its `Conv1D` layers stored as `nn.Linear`."""
    for name, module in list(model.named_modules()):
        if isinstance(module, Conv1D):
            linear = nn.Linear(*module.weight.shape)
            linear.weight.data.copy_(module.weight.T)
            linear.bias.data.copy_(module.bias)
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, linear)
    return model.eval()


@every_method
def test_transposed_storage_gives_the_same_adapter(method, tmp_path):
    one = saved_factors(started(method, pico_gpt2()), tmp_path / "conv1d")
    other = saved_factors(started(method, with_linears(pico_gpt2())), tmp_path / "linear")
    assert_close(one, other, tolerance=2e-3)  # as above


@every_method
def test_the_same_seed_gives_the_same_bits(method, tmp_path):
    found = []
    for i in range(2):
        torch.manual_seed(i)  # the global generator has no say
        found.append(saved_factors(started(method), tmp_path / str(i)))
    assert_close(*found, tolerance=0)


# The base model ----------------------------------------------------------------------------------


@every_method
@every_model
def test_base_weights_are_never_written(method, make, tmp_path):
    model = make()
    before = base_weights(model)
    if method in WITH_DATA:
        calibrate(model, config_of(method), quiet(token_batches()))
        assert same_weights(before, base_weights(model))
    peft_model = trained(method, model)
    peft_model.save_pretrained(tmp_path)
    assert same_weights(before, base_weights(peft_model))


@every_method
@every_model
def test_disabled_it_is_the_base_bit_for_bit(method, make):
    peft_model = trained(method, make())
    want = logits(make())
    assert not torch.equal(logits(peft_model), want)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), want)


@with_data
def test_without_calibration_it_says_what_to_pass(method):
    model = pico_llama()
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r"has no calibration.*pass calibration=<DataLoader"):
        get_peft_model(model, config_of(method, data=None))
    assert_as_before(model, before)


@with_data
def test_an_exception_in_the_users_loss_leaves_the_model_as_it_was(method):
    model = pico_llama()
    before = snapshot(model)
    calibration = failing_calibration(RuntimeError("mine"))
    with pytest.raises(RuntimeError, match="mine"):
        started(method, model, calibration=calibration)
    assert_as_before(model, before)
    assert not hasattr(model, "peft_config")


# Saved and loaded --------------------------------------------------------------------------------


CASES = [
    pytest.param(m.name, name, options, id=f"{m.name}-{name}-{'-'.join(options)}")
    for m in METHODS
    for name, options in (
        ("default", {}),
        ("german", {}),
        *([("german", {"use_rslora": True})] if m.needs != "nothing" else []),
    )
]


@pytest.mark.parametrize(("method", "name", "options"), CASES)
def test_plain_peft_loads_it_on_a_fresh_base(method, name, options, tmp_path):
    peft_model = trained(method, name=name, **options)
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pico_llama(), saved_in(tmp_path, name))
    assert type(loaded.peft_config["default"]) is LoraConfig
    assert relative_error(logits(loaded), logits(peft_model)) <= FLOAT32
    assert relative_error(logits(loaded), logits(pico_llama())) > 1e-3


@every_method
def test_plain_peft_loads_it_on_a_fresh_gpt2(method, tmp_path):
    peft_model = trained(method, pico_gpt2())
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pico_gpt2(), tmp_path)
    assert relative_error(logits(loaded), logits(peft_model)) <= FLOAT32


@every_method
def test_a_bfloat16_base_trains_and_reloads(method, tmp_path):
    peft_model = trained(method, pico_llama().bfloat16())
    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pico_llama().bfloat16(), tmp_path)
    # bfloat16 rounds each activation by up to 2^-8.
    assert relative_error(logits(loaded).float(), logits(peft_model).float()) <= 0.02


@every_method
def test_two_adapters_live_side_by_side(method, tmp_path):
    peft_model = trained(method)
    first = logits(peft_model)
    peft_model.add_adapter("second", config_of(method, r=3))
    assert torch.equal(logits(peft_model), first)
    peft_model.set_adapter("second")
    if INFO[method].preserves_output:
        assert relative_error(logits(peft_model), logits(pico_llama())) <= FLOAT32
    train_steps(peft_model, n=3)
    second = logits(peft_model)
    peft_model.set_adapter("default")
    assert torch.equal(logits(peft_model), first)

    peft_model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(pico_llama(), tmp_path)
    loaded.load_adapter(tmp_path / "second", "second")
    for name, want in {"default": first, "second": second}.items():
        loaded.set_adapter(name)
        assert relative_error(logits(loaded), want) <= FLOAT32, name


@every_method
@every_model
def test_load_for_training_continues(method, make, tmp_path):
    peft_model = trained(method, make())
    peft_model.save_pretrained(tmp_path)
    restored = load_for_training(make(), tmp_path)
    assert type(restored.peft_config["default"]) is INFO[method].config
    assert torch.equal(logits(restored), logits(peft_model))
    # SGD: the normalisation of Adam's first step would turn rounding into signs.
    for model in (peft_model, restored):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.eval()  # GPT-2 has dropout
        model(**token_batches()[0]).loss.backward()
        optimizer.step()
    assert relative_error(logits(restored), logits(peft_model)) <= FLOAT32


# Deferred ----------------------------------------------------------------------------------------


def one_shape(method):
    """Options under which a deferred adapter knows its ranks."""
    return {"rho": 1.0} if method == "eva" else {}


@with_data
def test_deferred_and_initialized_is_the_same_as_data_in_the_config(method, tmp_path):
    options = one_shape(method)
    want = saved_factors(started(method, **options), tmp_path / "want")
    peft_model = started(method, calibration="deferred", **options)
    report = initialize(peft_model, quiet(token_batches()))
    assert report.method == INFO[method].title
    assert_close(saved_factors(peft_model, tmp_path / "got"), want, tolerance=0)


@with_data
def test_deferred_is_the_base_and_refuses_to_train_and_to_save(method, tmp_path):
    peft_model = started(method, calibration="deferred", **one_shape(method))
    assert torch.equal(logits(peft_model), logits(pico_llama()))
    peft_model.train()
    with pytest.raises(NotInitializedError, match=r"call .*initialize\(model, data\)"):
        peft_model(**token_batches()[0])
    with pytest.raises(NotInitializedError, match="'default' is deferred and 14 layers"):
        peft_model.save_pretrained(tmp_path)
