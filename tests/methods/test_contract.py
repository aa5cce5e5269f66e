"""What every method promises: a method is a row, and one without a row fails."""

import dataclasses
import inspect
import json
import math
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.mapping import (
    PEFT_TYPE_TO_CONFIG_MAPPING,
    PEFT_TYPE_TO_PREFIX_MAPPING,
    PEFT_TYPE_TO_TUNER_MAPPING,
)
from peft.utils.other import get_pattern_key
from safetensors.torch import load_file
from torch import nn
from transformers.pytorch_utils import Conv1D

from peft_gradinit import (
    CorDAConfig,
    EvaConfig,
    LoraGAConfig,
    LoraOneConfig,
    MiLoRAConfig,
    OLoRAConfig,
    PiSSAConfig,
    SVFitConfig,
    calibrate,
    initialize,
    load_for_training,
)
from peft_gradinit.calibration.feed.batches import FIRST_ORIENTATION
from peft_gradinit.errors import CalibrationError, ConfigError, NotInitializedError
from peft_gradinit.methods import METHODS
from peft_gradinit.starts import GradInitConfig, Target
from peft_gradinit.tuners import GradInitModel, SVFitModel
from tests.failures import assert_as_before, failing_calibration, snapshot
from tests.guards import lived_in_model, random_states
from tests.guards import snapshot as everything
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
from tests.methods.models import narrow
from tests.methods.rows import (
    FLOAT32,
    INFO,
    WITH_DATA,
    config_of,
    every_method,
    saved_factors,
    started,
    with_data,
    with_gradients,
)
from tests.trainers import losses_of, trainer_of

ROWS = {
    "lora_ga": LoraGAConfig,
    "lora_one": LoraOneConfig,
    "eva": EvaConfig,
    "corda": CorDAConfig,
    "pissa": PiSSAConfig,
    "milora": MiLoRAConfig,
    "olora": OLoRAConfig,
    "svfit": SVFitConfig,
}
TURNED = 2e-3
"""The same of factors: singular vectors turn by the rounding over the gap to the next value, here
some hundredths."""

every_model = pytest.mark.parametrize(
    "make", [pytest.param(pico_llama, id="llama"), pytest.param(pico_gpt2, id="gpt2-conv1d-tied")]
)


def trained(method, model=None, name="default", **options):
    peft_model = started(method, model, name, **options)
    train_steps(peft_model)
    return peft_model


def saved_in(directory, name="default"):
    return directory if name == "default" else directory / name


def assert_close(one, other, tolerance):
    assert one.keys() == other.keys()
    for layer, pair in one.items():
        for got, want in zip(pair, other[layer], strict=True):
            assert got.shape == want.shape, layer
            error = (got - want).norm() / want.norm().clamp_min(1e-6)
            assert error <= tolerance, (layer, error)


def growth(method):
    """Saved rank over live rank, as the table says."""
    return 2 if "2r" in INFO[method].saved_as() else 1


def test_every_method_has_a_row():
    assert set(ROWS) == {m.name for m in METHODS}
    for m in METHODS:
        assert ROWS[m.name] is m
        config = config_of(m.name)
        assert (config.method, config.peft_type.value) == (m.method, m.name.upper())


# The table ---------------------------------------------------------------------------------------


@every_method
def test_the_row_names_the_classes_that_are_registered(method):
    row = INFO[method]
    kind = config_of(method).peft_type
    assert PEFT_TYPE_TO_CONFIG_MAPPING[kind] is row
    model_cls = GradInitModel if issubclass(row, GradInitConfig) else SVFitModel
    assert PEFT_TYPE_TO_TUNER_MAPPING[kind] is model_cls
    assert type(started(method).base_model) is model_cls
    assert PEFT_TYPE_TO_PREFIX_MAPPING[kind] == model_cls.prefix
    assert row.paper in inspect.getmodule(row).__doc__


@every_method
def test_the_row_says_what_is_measured(method):
    config, needs = config_of(method), INFO[method].needed()
    if needs == "nothing":
        assert not config.needs().reads_data
        assert started(method).peft_config["default"] is not None  # without any data
        return
    n_backwards = []

    def loss_fn(model, batch):
        loss = model(**batch).loss
        if loss.requires_grad:
            loss.register_hook(lambda gradient: n_backwards.append(1))
        return loss

    result = calibrate(pico_llama(), config, quiet(token_batches(), loss_fn=loss_fn))
    assert len(n_backwards) == (3 if needs == "gradients" else 0)
    assert result.fingerprint.statistic == config.needs().statistic
    assert result.need == config.needs()
    measures_outputs = any(len(t.U) for t in result.triplets.values())
    assert measures_outputs == (needs == "gradients")


@with_data
def test_the_row_says_what_the_function_at_step_zero_is(method):
    """What it is of all methods, `test_the_function_at_step_zero_...` measures."""
    config, preserves = config_of(method), INFO[method].preserves_output
    assert config.checks_step == (not preserves)
    report = started(method).base_model.init_report["default"]
    assert (report.drift <= FLOAT32) == preserves
    moves = any(m.start_norm for m in report.modules)
    assert config.anchored == (preserves and moves)


@every_method
def test_the_row_says_what_is_saved(method, tmp_path):
    saved_as = INFO[method].saved_as()
    started(method).save_pretrained(tmp_path)
    assert LoraConfig.from_pretrained(tmp_path).r == growth(method) * 4
    assert saved_as.startswith(f"LoRA of rank {'2r' if growth(method) == 2 else 'r'}")
    assert (growth(method) == 2) == getattr(ROWS[method], "anchored", False)
    has_compact_form = "save_format" in inspect.signature(ROWS[method]).parameters
    assert has_compact_form == saved_as.endswith("or r numbers a layer")
    if has_compact_form:
        started(method, save_format="compact").save_pretrained(tmp_path / "compact")
        entries = load_file(tmp_path / "compact" / "adapter_model.safetensors")
        trained_numbers = [v.numel() for n, v in entries.items() if n.endswith("svfit_delta")]
        assert trained_numbers == [4] * 14


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
    assert total == growth(method) * 4 * n_targets  # an allocation keeps the sum


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
    S = torch.tensor(SPECTRA[spectrum])
    readouts = {"U": U, "S": S, "Vh": Vh, "C": (Vh.T * S) @ Vh}
    if method == "corda" and not S.any():
        return  # such a layer is named before: its inputs are zero
    for more in OPTIONS.get(method, [{}]):
        assert_finite(config_of(method, **more), nn.Linear(16, 12), readouts)


OPTIONS = {
    "eva": [{}, {"whiten": True}],
    "corda": [{}, {"mode": "kpm"}],
    "pissa": [{}, {"svd": "randomized"}],
}
"""Other settings of a method that its formula depends on."""


def assert_finite(config, linear, readouts):
    target = Target("x", linear, (12, 16), 4, 4, 8.0)
    A0, B0 = config.factors(readouts, target, 2.0, 0)
    assert A0.shape == (4, 16)
    assert B0.shape == (12, 4)
    assert A0.isfinite().all()
    assert B0.isfinite().all()
    assert (B0 @ A0).isfinite().all()


WEIGHTS = {
    "zero": lambda: torch.zeros(12, 16),
    "rank-deficient": lambda: torch.outer(torch.randn(12), torch.randn(16)),
    "huge": lambda: 1e30 * torch.randn(12, 16),
    "tiny": lambda: 1e-42 * torch.randn(12, 16),
}


@pytest.mark.parametrize("method", [m.name for m in METHODS if getattr(m, "reads_weights", False)])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_starts_are_finite_on_degenerate_weights(method, weight):
    linear = nn.Linear(16, 12)
    linear.weight.data = WEIGHTS[weight]()
    x = torch.randn(40, 16)
    for more in OPTIONS.get(method, [{}]):
        assert_finite(config_of(method, **more), linear, {"C": x.T @ x / 40})


@pytest.mark.parametrize("svd", ["exact", "randomized"])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_bases_are_finite_on_degenerate_weights(weight, svd):
    W = WEIGHTS[weight]()
    config = config_of("svfit", svd=svd)
    U, Vh = config.basis(W, 4, "x")
    torch.testing.assert_close(U.T @ U, torch.eye(4))
    torch.testing.assert_close(Vh @ Vh.T, torch.eye(4))
    A, B = config.factors(U, torch.zeros(4), Vh)
    assert not (B @ A).any()


def of_tokens(*tokens):
    """Sequences of one token each, in turn; a Llama's layers then see as many distinct inputs."""
    return [pad([torch.full((12 + i,), t) for i, t in enumerate(tokens * 2)])]


def constant_inputs(model):
    return model, quiet(of_tokens(5))


def two_inputs(model):
    return model, quiet(of_tokens(5, 7))


def huge_activations(model):
    """Inputs of 1e6, products of 1e12."""
    for layer in model.model.layers:
        layer.post_attention_layernorm.weight.data *= 1e6
    return model, quiet(token_batches())


def huge_loss(model):
    return model, quiet(token_batches(), loss_fn=lambda m, b: 1e6 * m(**b).loss)


def tiny_loss(model):
    return model, quiet(token_batches(), loss_fn=lambda m, b: 1e-6 * m(**b).loss)


DEGENERATE = [
    (m.name, case)
    for m in METHODS
    for case in (constant_inputs, two_inputs, huge_activations, huge_loss, tiny_loss)
    if m.needed() == "gradients"
    or case is huge_activations
    # Nothing varies in constant inputs: `test_inputs_without_variance_...`
    or (m.needed() == "inputs" and case is two_inputs)
    or (m.name == "corda" and case in (constant_inputs, two_inputs))
]


DIRECTIONS = {
    ("lora_ga", constant_inputs): "1 of 4",
    ("lora_ga", two_inputs): "2 of 4",
    ("lora_one", constant_inputs): "1 of 2",
    # Of their difference; rounding decides which layer gets the third rank.
    ("eva", two_inputs): "1 of [23]",
}
"""Of those that rank 2 uses, what the data give; the others give as many as it uses."""


@pytest.mark.parametrize("estimator", ["dense", "sketch"])
@pytest.mark.parametrize(("method", "case"), DEGENERATE)
def test_degenerate_data_give_a_finite_start_that_trains(method, case, estimator, tmp_path):
    model, calibration = case(wide_llama() if estimator == "sketch" else pico_llama())
    options = {}
    if method in WITH_DATA:
        options["calibration"] = dataclasses.replace(calibration, estimator=estimator)
    few = DIRECTIONS.get((method, case))
    with pytest.warns(UserWarning, match=rf"proj: {few}.*more rows") if few else nullcontext():
        peft_model = started(method, model, r=2, **options)
    for layer, pair in saved_factors(peft_model, tmp_path).items():
        assert all(part.isfinite().all() for part in pair), layer
    with torch.no_grad():
        assert logits(peft_model).isfinite().all()
        with peft_model.disable_adapter():
            base = logits(peft_model)
    if INFO[method].preserves_output:
        assert relative_error(logits(peft_model), base) <= FLOAT32
    assert all(map(math.isfinite, train_steps(peft_model, n=3, lr=1e-4)))
    assert logits(peft_model).isfinite().all()


# What the start is -------------------------------------------------------------------------------


@every_method
@every_model
def test_the_function_at_step_zero_is_the_bases_iff_promised(method, make):
    error = relative_error(logits(started(method, make())), logits(make()))
    assert (error <= FLOAT32) == INFO[method].preserves_output
    assert error < 0.5


N_SEQUENCES = 30
"""Sketches are oriented after 8 and 24 of them, within batches of most sizes."""


def wide_llama():
    """Layers so wide that they are sketched at r 2, and gradients of far higher rank than a sketch."""
    sizes = {"hidden_size": 320, "intermediate_size": 448, "num_hidden_layers": 1}
    return pico_llama(**sizes, num_key_value_heads=4)


SPLIT = 5e-4
"""Relative error of sketched starts from batches of other sizes; measured 1e-4."""


def by_batches_of(size, n=N_SEQUENCES):
    rows = rows_of(token_batches(n, batch_size=n))
    return [pad(rows[i : i + size], extra=2) for i in range(0, n, size)]


@pytest.mark.parametrize(
    ("estimator", "make", "tolerance"),
    [
        pytest.param("dense", pico_llama, TURNED, id="dense"),
        pytest.param("sketch", wide_llama, SPLIT, id="sketch"),
    ],
)
@with_data
def test_the_split_into_batches_does_not_matter(method, estimator, make, tolerance, tmp_path):
    """Batches are cut where sketches are oriented, so the first batches do not say where."""
    found = []
    for size in (1, 7, N_SEQUENCES):
        calibration = quiet(by_batches_of(size), estimator=estimator)
        # EVA without an allocation: the last of more components has a close neighbour here.
        options = {"r": 2, "calibration": calibration, **one_shape(method)}
        peft_model = started(method, make(), **options)
        found.append(saved_factors(peft_model, tmp_path / str(size)))
    for other in found[1:]:
        assert_close(other, found[0], tolerance)


@pytest.mark.parametrize("method", [m for m in WITH_DATA if ROWS[m]().needs().size(1)])
def test_another_sketch_moves_the_start_much_further_than_another_split(method):
    """So that the tolerance above means something: the sketch is far from exact here."""
    options = {"r": 2, **one_shape(method)}

    def product(**how):
        calibration = quiet(by_batches_of(5), **how)
        result = calibrate(wide_llama(), config_of(method, **options), calibration)
        return {name: t.Vh.T @ t.Vh for name, t in result.triplets.items()}

    def orients_elsewhere(model, batch):  # batches of a loss function are not cut
        return model(**batch).loss

    assert N_SEQUENCES > FIRST_ORIENTATION * 3
    want = product()
    others = {"seed": 1, "loss_fn": orients_elsewhere, "estimator": "dense"}
    for what, value in others.items():
        other = product(**{what: value})
        apart = [relative_error(other[name], want[name]) for name in want]
        assert min(apart) > 10 * SPLIT, what


@with_gradients
@pytest.mark.parametrize("scale", [1e6, 1000, 1e-6])
def test_the_scale_of_the_loss_does_not_matter(method, scale, tmp_path):
    found = []
    for factor in (1, scale):
        calibration = quiet(token_batches(), loss_fn=lambda m, b, s=factor: s * m(**b).loss)
        model = started(method, calibration=calibration)
        found.append(saved_factors(model, tmp_path / str(factor)))
    assert_close(*found, TURNED)


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
    assert_close(one, other, TURNED)


def with_weights_stored_transposed(model):
    """The same weights as views of contiguous transposes, as some loaders leave them."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(module.weight.detach().T.contiguous().T)
            assert not module.weight.is_contiguous()
    return model


def with_strided_inputs(model):
    """Every linear layer is given the same values in a tensor that is not contiguous."""

    def hook(module, args):
        return (args[0].transpose(-1, -2).contiguous().transpose(-1, -2), *args[1:])

    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.register_forward_pre_hook(hook)
    return model


@every_method
@pytest.mark.parametrize("change", [with_weights_stored_transposed, with_strided_inputs])
@pytest.mark.parametrize("make", [pico_llama, wide_llama], ids=["dense", "sketch"])
def test_strides_of_weights_and_inputs_do_not_matter(method, change, make, tmp_path):
    one = saved_factors(started(method, make(), r=2), tmp_path / "plain")
    other = saved_factors(started(method, change(make()), r=2), tmp_path / "strided")
    assert_close(one, other, TURNED)


@every_method
def test_an_adapter_fits_its_base_whichever_way_it_is_stored(method, tmp_path):
    model = with_weights_stored_transposed(pico_llama())
    before = base_weights(model)
    peft_model = trained(method, model)
    peft_model.save_pretrained(tmp_path)
    assert same_weights(before, base_weights(peft_model))
    restored = load_for_training(pico_llama(), tmp_path)  # refuses another base
    assert relative_error(logits(restored), logits(peft_model)) <= FLOAT32


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


@with_data
@every_model
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed")
def test_a_calibration_leaves_everything_as_it_was(method, make):
    model = lived_in_model(make)
    before = everything(model)
    config = config_of(method)
    result = calibrate(model, config, quiet(token_batches()))
    assert not result.failures
    after = everything(model)
    assert [k for k in before if before[k] != after[k]] == []


@every_method
@every_model
@pytest.mark.filterwarnings("ignore:Full backward hook is firing when gradients are computed")
def test_a_start_leaves_of_the_base_what_plain_lora_leaves(method, make):
    """Modes, hooks, `.grad`, `use_cache`; PEFT itself freezes the base."""
    states = []
    for config in (
        LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"),
        config_of(method, **one_shape(method)),
    ):
        model = lived_in_model(make)
        modules, parameters = dict(model.named_modules()), dict(model.named_parameters())
        get_peft_model(model, config)
        state = {
            name: (
                m.training,
                len(m._forward_hooks),
                len(m._forward_pre_hooks),
                len(m._backward_hooks),
            )
            for name, m in modules.items()
        }
        for name, p in parameters.items():
            state[f"{name}.flags"] = (p.requires_grad, p.grad is None or p.grad.sum().item())
        state["use_cache"] = model.config.use_cache
        state["numpy, python"] = random_states()[1:]
        states.append(state)
    plain, ours = states
    assert [k for k in plain if plain[k] != ours[k]] == []


@with_data
def test_a_start_draws_from_torch_what_plain_lora_draws(method):
    """So that a seeded comparison with plain LoRA sees the same dropout and the same batches."""
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    states = []
    for config in (LoraConfig(**options), config_of(method, **one_shape(method))):
        model = pico_llama()
        get_peft_model(model, config)
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


# Data that do not suffice ------------------------------------------------------------------------


def assert_plain(peft_model, names):
    """The layers named have the start of plain LoRA, all others that of the method."""
    report = peft_model.base_model.init_report["default"]
    assert {m.name for m in report.modules if m.method == "lora"} == set(names)
    for m in report.modules:
        B = peft_model.base_model.model.get_submodule(m.name).lora_B["default"]
        delta = peft_model.base_model.model.get_submodule(m.name).get_delta_weight("default")
        assert delta.isfinite().all()
        if m.name in names:
            assert not delta.any()
            assert B.weight.isfinite().all()


@with_gradients
def test_a_zero_gradient_everywhere_is_an_error_or_named_plain_lora(method):
    calibration = quiet(token_batches(), loss_fn=lambda m, b: 0 * m(**b).loss)
    model = pico_llama()
    before = snapshot(model)
    with pytest.raises(CalibrationError, match=r"14 of its targets .*q_proj: its gradient is zero"):
        started(method, model, calibration=calibration)
    assert_as_before(model, before)
    with pytest.warns(UserWarning, match="gives 14 targets a plain LoRA start"):
        peft_model = started(method, model, calibration=calibration, uncalibrated="lora")
    assert_plain(peft_model, [m.name for m in peft_model.base_model.init_report["default"].modules])


def without_second_mlp(model):
    """Nothing of the second block's MLP reaches the output, so its first two layers get no gradient."""
    model.model.layers[1].mlp.down_proj.weight.data.zero_()
    return model


@with_gradients
def test_layers_with_a_zero_gradient_are_named_and_the_others_start(method):
    names = [f"model.layers.1.mlp.{n}_proj" for n in ("gate", "up")]
    with pytest.raises(CalibrationError, match="2 of its targets") as raised:
        started(method, without_second_mlp(pico_llama()))
    assert all(
        f"{name}: its gradient is zero over 3 batches" in str(raised.value) for name in names
    )
    with pytest.warns(UserWarning, match="gives 2 targets a plain LoRA start"):
        peft_model = started(method, without_second_mlp(pico_llama()), uncalibrated="lora")
    assert_plain(peft_model, names)


@pytest.mark.parametrize("method", [n for n in INFO if INFO[n].needed() == "inputs"])
def test_inputs_without_variance_are_an_error_or_named_plain_lora(method):
    model, calibration = constant_inputs(pico_llama())
    with pytest.raises(CalibrationError, match=r"14 of its targets .*its inputs are constant over"):
        started(method, model, calibration=calibration)
    with pytest.warns(UserWarning, match="gives 14 targets a plain LoRA start"):
        peft_model = started(method, model, calibration=calibration, uncalibrated="lora")
    assert_plain(peft_model, [m.name for m in peft_model.base_model.init_report["default"].modules])


# Saved and loaded --------------------------------------------------------------------------------


CASES = [
    pytest.param(m.name, name, options, id=f"{m.name}-{name}-{'-'.join(options)}")
    for m in METHODS
    for name, options in (
        ("default", {}),
        ("german", {}),
        *([("german", {"use_rslora": True})] if m.needed() != "nothing" else []),
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
    assert type(restored.peft_config["default"]) is INFO[method]
    assert torch.equal(logits(restored), logits(peft_model))
    # SGD: the normalisation of Adam's first step would turn rounding into signs.
    for model in (peft_model, restored):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model.eval()  # GPT-2 has dropout
        model(**token_batches()[0]).loss.backward()
        optimizer.step()
    assert relative_error(logits(restored), logits(peft_model)) <= FLOAT32


# Trainer -----------------------------------------------------------------------------------------

TRAINER = [
    *(pytest.param(m.name, pico_llama, {}, id=m.name) for m in METHODS),
    pytest.param(
        "eva",
        lambda: narrow(pico_llama()),
        {"r": 1, "target_modules": ["q_proj", "v_proj", "down_proj"]},
        id="eva-without-some-layers",
    ),
]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.filterwarnings("ignore:.*were not in the expected|.*missing keys.*")
@pytest.mark.parametrize(("method", "make", "options"), TRAINER)
def test_a_resumed_run_has_the_losses_of_the_uninterrupted_one(method, make, options, tmp_path):
    peft_model = started(method, make(), **options)
    if options:
        ranks = peft_model.base_model.init_report["default"].ranks().values()
        assert min(ranks) == 0
    whole = trainer_of(peft_model, tmp_path)
    whole.train()
    checkpoint = tmp_path / "checkpoint-3"
    resumed = trainer_of(load_for_training(make(), checkpoint), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert len(losses_of(whole)) == 6
    assert losses_of(resumed) == losses_of(whole)
    assert torch.equal(logits(resumed.model), logits(whole.model))


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.filterwarnings("ignore:.*were not in the expected|.*missing keys.*")
@with_data
def test_a_checkpoint_starts_a_deferred_adapter(method, tmp_path):
    options = one_shape(method)
    whole = trainer_of(started(method, **options), tmp_path)
    whole.train()
    peft_model = started(method, calibration="deferred", **options)
    resumed = trainer_of(peft_model, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert losses_of(resumed) == losses_of(whole)
    assert torch.equal(logits(resumed.model), logits(whole.model))


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
    assert report.method == INFO[method].method
    assert_close(saved_factors(peft_model, tmp_path / "got"), want, tolerance=0)


@with_data
def test_deferred_is_the_base_and_refuses_to_train_to_save_and_to_merge(method, tmp_path):
    peft_model = started(method, calibration="deferred", **one_shape(method))
    assert torch.equal(logits(peft_model), logits(pico_llama()))
    peft_model.train()
    with pytest.raises(NotInitializedError, match=r"call .*initialize\(model, data\)"):
        peft_model(**token_batches()[0])
    with pytest.raises(NotInitializedError, match="'default' is deferred and 14 layers"):
        peft_model.save_pretrained(tmp_path)
    with pytest.raises(NotInitializedError, match=r"'default' is deferred .* nothing to merge"):
        peft_model.merge_and_unload()
