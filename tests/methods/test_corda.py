"""CorDA: components of the weight, ordered by what the inputs need of it, as in PEFT."""

import pytest
import torch
from peft import LoraConfig
from peft.tuners.lora.config import CordaConfig
from peft.tuners.lora.corda import preprocess_corda

from peft_gradinit import CalibrationResult, CorDAConfig, LoraGAConfig, MiLoRAConfig, calibrate
from peft_gradinit.errors import ConfigError, FingerprintError
from peft_gradinit.methods import corda
from peft_gradinit.methods.corda import DAMPING, corda_factors
from tests.helpers import (
    VOCABULARY,
    logits,
    lora_ga,
    pad,
    pico_gpt2,
    pico_llama,
    quiet,
    relative_error,
    rows_of,
    token_batches,
)
from tests.methods.weight_starts import (
    ALPHA,
    R,
    best_approximation,
    config_of,
    layer_inputs,
    products,
    started,
    taken_by_peft,
)

INVERTED = 1e-4
"""Relative error by float32's rounding times the condition of `C`, some hundreds; measured 1e-5."""

OF_MODELS = 5e-3
"""The same of models, where 60 tokens of 112 features leave `C` a condition of some thousands, and
singular values lie as close as those of random weights; measured 2e-3."""

SHAPES = [(30, 20), (20, 30), (16, 16)]
both_modes = pytest.mark.parametrize("mode", ["ipm", "kpm"])


def weight_and_moment(shape, seed=0):
    """Inputs whose variance falls by 100 from the first feature to the last."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(400, shape[1], generator=generator) * torch.logspace(0, -1, shape[1])
    return torch.randn(shape, generator=generator), x.T @ x / len(x)


def taken(W, C, r, mode="ipm", scaling=2.0):
    """`s B0 A0`."""
    A0, B0 = corda_factors(W, C, r=r, mode=mode, scaling=scaling)
    assert (A0.shape, B0.shape) == ((r, W.shape[1]), (W.shape[0], r))
    return scaling * (B0 @ A0)


def formula(W, C, r, mode, damping):
    """`U S V^T C^-1` of the first or the last components, float64."""
    W, C = W.double(), C.double() + damping * C.diagonal().mean() * torch.eye(len(C))
    principal = best_approximation(W @ C, r if mode == "ipm" else min(W.shape) - r)
    return (principal if mode == "ipm" else W @ C - principal) @ torch.linalg.inv(C)


# The formula -------------------------------------------------------------------------------------


@both_modes
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("r", [1, 5])
def test_components_are_the_papers_with_no_more_damping_than_needed(shape, r, mode):
    W, C = weight_and_moment(shape)
    product = taken(W, C, r, mode)
    assert relative_error(product, formula(W, C, r, mode, DAMPING)) <= INVERTED
    assert relative_error(product, formula(W, C, r, mode, 2 * DAMPING)) > 5 * INVERTED


def test_inputs_of_few_tokens_cost_no_accuracy():
    """`C` has a condition of some thousands; by its inverse the error was 2e-4."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(20, 128, generator=generator)
    x[:, 0] += 5  # one feature with a large mean, as language models have
    W, C = torch.randn(96, 128, generator=generator), x.T @ x / len(x)
    assert relative_error(taken(W, C, 8), formula(W, C, 8, "ipm", DAMPING)) <= 2e-5


@both_modes
@pytest.mark.parametrize("shape", SHAPES)
def test_a_components_row_is_as_long_as_its_column(shape, mode):
    """Else Adam learns the two at rates that depend on the units of the inputs."""
    W, C = weight_and_moment(shape)
    A0, B0 = corda_factors(W, C, r=5, mode=mode, scaling=2.0)
    torch.testing.assert_close(A0.norm(dim=1), B0.norm(dim=0))


@both_modes
@pytest.mark.parametrize("rank", [0, 2])
def test_directions_that_the_weight_has_not_have_short_factors(rank, mode):
    W, C = weight_and_moment((30, 20))
    W = W[:, :rank] @ W[:rank]
    A0, B0 = corda_factors(W, C, r=5, mode=mode, scaling=2.0)
    lengths = A0.norm(dim=1), B0.norm(dim=0)
    n = rank if mode == "ipm" else 0
    assert all((of[n:] <= 1e-2).all() for of in lengths)
    assert rank or not torch.cat([*A0, *B0]).any()


@both_modes
@pytest.mark.parametrize("shape", SHAPES)
def test_all_components_are_the_weight_and_the_modes_complement_each_other(shape, mode):
    W, C = weight_and_moment(shape)
    assert relative_error(taken(W, C, min(shape), mode), W) <= INVERTED
    rest = taken(W, C, min(shape) - 5, "kpm")
    assert relative_error(taken(W, C, 5, "ipm") + rest, W) <= INVERTED


@both_modes
@pytest.mark.parametrize("scaling", [0.25, 1.0, 7.0])
def test_neither_the_scaling_nor_the_units_of_the_inputs_matter(scaling, mode):
    W, C = weight_and_moment((30, 20))
    want = taken(W, C, 5, mode)
    assert relative_error(taken(W, C, 5, mode, scaling), want) <= 1e-6  # float32
    A0, B0 = corda_factors(W, 2.0**40 * C, r=5, mode=mode, scaling=scaling)
    same_A0, same_B0 = corda_factors(W, C, r=5, mode=mode, scaling=scaling)
    assert torch.equal(A0, same_A0)  # a power of two, which float32 does not round
    assert torch.equal(B0, same_B0)


@pytest.mark.parametrize("shape", SHAPES)
def test_equal_inputs_in_all_directions_give_pissa_and_milora(shape):
    W, _ = weight_and_moment(shape)
    C = 3 * torch.eye(shape[1])
    assert relative_error(taken(W, C, 5, "ipm"), best_approximation(W, 5)) <= INVERTED
    minor = W - best_approximation(W, min(shape) - 5)
    assert relative_error(taken(W, C, 5, "kpm"), minor) <= INVERTED


@both_modes
@pytest.mark.parametrize("n", [20, 1200], ids=["narrow", "wide"])
def test_inputs_that_are_all_alike_give_a_finite_start(n, mode):
    W, _ = weight_and_moment((30, n))
    x = torch.randn(n, generator=torch.Generator().manual_seed(1))
    assert taken(W, torch.outer(x, x), 5, mode).isfinite().all()


def test_damping_is_doubled_while_the_inverse_is_not_accurate_and_ends(monkeypatch):
    W, C = weight_and_moment((30, 20))
    monkeypatch.setattr(corda, "LARGEST_ERROR", 0.0)  # which no inverse keeps
    assert relative_error(taken(W, C, 5), formula(W, C, 5, "ipm", 128 * DAMPING)) <= INVERTED


# The paper's claim -------------------------------------------------------------------------------


def test_kpm_takes_out_what_the_inputs_need_least_less_than_milora_does():
    """In every layer, and of the whole model."""
    inputs = layer_inputs(pico_llama(), rows_of(token_batches()))
    ours = products(started(CorDAConfig, pico_llama(), mode="kpm"))
    minor = products(started(MiLoRAConfig, pico_llama()))
    for name, x in inputs.items():
        assert (x @ ours[name].T).norm() < 0.95 * (x @ minor[name].T).norm(), name

    def without(product):
        model = pico_llama()
        for name, matrix in product.items():
            model.get_submodule(name).weight.data -= matrix
        return relative_error(logits(model), logits(pico_llama()))

    assert without(ours) < without(minor)


# PEFT --------------------------------------------------------------------------------------------

NAMES = {
    pico_llama: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    pico_gpt2: ["c_attn", "c_proj", "c_fc"],
}


@both_modes
@pytest.mark.parametrize("make", NAMES, ids=["llama", "gpt2"])
def test_what_is_taken_out_is_what_peft_takes_out(make, mode):
    """Of one sequence: PEFT divides each by its largest entry, which then does not matter."""
    row = torch.randint(1, VOCABULARY, (60,), generator=torch.Generator().manual_seed(1))
    model = make()
    options = {"target_modules": NAMES[make], "corda_config": CordaConfig(corda_method=mode)}
    config = LoraConfig(r=R, lora_alpha=ALPHA, init_lora_weights="corda", **options)
    preprocess_corda(model, config, run_model=lambda: model(row[None]))
    theirs = taken_by_peft(model, "corda", **options)
    ours = products(started(CorDAConfig, make(), mode=mode, calibration=quiet([pad([row])])))
    assert ours.keys() == theirs.keys()
    for name, want in theirs.items():
        assert relative_error(ours[name], want) <= OF_MODELS, name


# What is measured --------------------------------------------------------------------------------


def moments(batches):
    result = calibrate(pico_llama(), config_of(CorDAConfig), quiet(batches))
    return {name: parts["C"] for name, parts in result.readouts.items()}


def test_the_moment_is_a_plain_mean_over_tokens_without_padding_and_labels():
    rows = rows_of(token_batches())
    inputs = layer_inputs(pico_llama(), rows)
    padded = [pad(rows[i : i + 5], extra=7) for i in (0, 5, 10)]
    unlabelled = [{k: v for k, v in b.items() if k != "labels"} for b in token_batches()]
    masked = [{**b, "labels": torch.full_like(b["labels"], -100)} for b in token_batches()]
    for batches in (token_batches(), padded, unlabelled, masked):
        for name, C in moments(batches).items():
            want = inputs[name].T @ inputs[name] / len(inputs[name])
            assert relative_error(C, want) <= 1e-5, name  # sums in float32


def test_layers_with_the_same_inputs_share_one_moment_in_memory():
    result = calibrate(pico_llama(), config_of(CorDAConfig), quiet(token_batches()))
    found = {name: parts["C"].data_ptr() for name, parts in result.readouts.items()}
    assert len({found[f"model.layers.1.self_attn.{n}_proj"] for n in "qkv"}) == 1
    assert found["model.layers.1.mlp.gate_proj"] == found["model.layers.1.mlp.up_proj"]
    assert len(set(found.values())) == 8
    distinct = 2 * 4 * (3 * 48**2 + 112**2)
    assert distinct <= result.facts.state_bytes <= 1.05 * distinct


# Calibrated once ---------------------------------------------------------------------------------


def test_one_calibration_serves_every_rank_and_mode(tmp_path):
    result = calibrate(pico_llama(), config_of(CorDAConfig), quiet(token_batches()))
    path = result.save(tmp_path)
    again = CalibrationResult.load(path)
    assert (again.need, again.fingerprint) == (result.need, result.fingerprint)
    for name, parts in result.readouts.items():
        assert torch.equal(again.readouts[name]["C"], parts["C"])
    for options in ({}, {"mode": "kpm"}, {"r": 9, "mode": "kpm", "use_rslora": True}):
        want = products(started(CorDAConfig, pico_llama(), **options))
        for saved in (str(path), result):
            got = products(started(CorDAConfig, pico_llama(), calibration=saved, **options))
            assert all(torch.equal(got[name], product) for name, product in want.items())


def test_calibrations_of_other_methods_and_damaged_ones_are_refused():
    other = calibrate(pico_llama(), lora_ga(), quiet(token_batches()))
    own = calibrate(pico_llama(), config_of(CorDAConfig), quiet(token_batches()))
    with pytest.raises(FingerprintError, match="'gradient' but the method needs 'second_moment'"):
        started(CorDAConfig, pico_llama(), calibration=other)
    with pytest.raises(FingerprintError, match="'second_moment' but the method needs 'gradient'"):
        started(LoraGAConfig, pico_llama(), calibration=own)
    own.readouts["model.layers.0.mlp.gate_proj"]["C"][0, 0] = float("nan")
    with pytest.raises(FingerprintError, match=r"gate_proj should have finite second moments of"):
        started(CorDAConfig, pico_llama(), calibration=own)


@pytest.mark.filterwarnings("ignore:`corda_config` specified but will be ignored")
def test_an_unknown_mode_and_the_options_of_peft_are_refused():
    for options, message in (
        ({"mode": "kpa"}, r"mode must be one of \('ipm', 'kpm'\), got 'kpa'"),
        ({"corda_config": CordaConfig()}, r"corda_config=.*: that is PEFT's own CorDA; use"),
        ({"calibration": CordaConfig()}, r"CordaConfig.* is a sub-config of PEFT's own method"),
    ):
        with pytest.raises(ConfigError, match=message):
            CorDAConfig(**options)
