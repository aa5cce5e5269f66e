"""What a pass was said to hold and send, against what it holds and sends."""

import itertools

import pytest
import torch

from peft_gradinit import EvaConfig, LoraGAConfig, calibrate
from peft_gradinit.calibration import Gradients, Inputs, PassSize, plan_pass
from peft_gradinit.calibration.feed.batches import budgeted, n_orientations
from peft_gradinit.calibration.feed.budget import Budget
from peft_gradinit.linalg import draw_test_matrix
from tests.distributed.counted import WIDE, config_of
from tests.distributed.launch import launch
from tests.helpers import pico_llama, quiet, token_batches

NEED = {cls.__name__: config_of(cls).needs() for cls in (LoraGAConfig, EvaConfig)}
GROUPS = [["model.layers.0.self_attn.q_proj", "model.layers.0.self_attn.k_proj"]]
GROUPS += [["model.layers.0.mlp.down_proj"]]


@pytest.mark.slow
def test_two_processes_send_and_hold_what_was_said():
    results = launch("tests.distributed.counted", "passes")
    assert [kind for kind, _ in results] == ["value"] * 2, results
    for _, found in results:
        for (config, estimator), real in found.items():
            size = PassSize(*real["read"], n_processes=2, estimator=estimator)
            said = plan_pass(real["targets"], NEED[config], size, groups=GROUPS)
            cost = said.sketched
            assert said.n_orientations == 2
            assert real["held"] == cost.held_bytes, (config, estimator)
            assert real["sum"] == cost.summed_bytes, (config, estimator)
            assert real["broadcast"] == cost.agreed_bytes + cost.factor_bytes, (config, estimator)


@pytest.mark.parametrize("n_sequences", [4, 8, 9, 24, 25, 80])
@pytest.mark.parametrize("config_cls", [LoraGAConfig, EvaConfig])
def test_one_process_holds_what_was_said_and_sends_nothing(config_cls, n_sequences):
    config = config_of(config_cls)
    batches = token_batches(n=n_sequences, batch_size=5)
    result = calibrate(pico_llama(**WIDE), config, quiet(batches))
    size = PassSize(n_sequences, result.facts.n_tokens)
    said = plan_pass(result.fingerprint.targets, config.needs(), size, groups=GROUPS).sketched
    assert said.held_bytes == result.facts.state_bytes
    assert said.summed_bytes == said.agreed_bytes == 0
    tensors = [t for svd in result.triplets.values() for t in svd]
    assert said.factor_bytes == sum(t.numel() * t.element_size() for t in tensors)


@pytest.mark.parametrize("n_sequences", [1, 8, 9, 24, 25, 72, 73, 100])
def test_orientations_are_those_of_the_loop(n_sequences):
    calibration = quiet(token_batches(n=n_sequences, batch_size=7))
    steps = budgeted(
        calibration.data, calibration, pico_llama(), Budget(calibration), separable=True
    )
    assert sum(step.orient for step in steps) == n_orientations(n_sequences)


def test_dense_numbers_are_those_of_whole_matrices():
    targets = {"a": [640, 512, 8], "b": [320, 1024, 8]}
    size = PassSize(64, 1000, n_processes=4)
    gradients, inputs = (plan_pass(targets, need, size).dense for need in (Gradients(), Inputs()))
    n = 640 * 512 + 320 * 1024
    assert gradients.held_bytes == gradients.summed_bytes == 4 * n
    assert gradients.flops == 2 * 1000 * n
    moments = 512**2 + 1024**2
    vectors = 4 * (512 + 1024)
    assert inputs.held_bytes == 4 * moments + 2 * vectors + 2 * 4
    assert inputs.flops == 2 * 1000 * moments


def test_arithmetic_is_that_of_the_products():
    out_features, in_features = 640, 512
    targets = {"a": [out_features, in_features, 8]}
    size = PassSize(64, 1000)
    by_gradients = plan_pass(targets, Gradients(), size).sketched.flops
    assert by_gradients == 4 * 1000 * 80 * (out_features + in_features)
    assert plan_pass(targets, Inputs(), size).sketched.flops == 4 * 1000 * 96 * in_features


def test_layers_that_some_tokens_reach_compute_less_and_hold_as_much():
    targets = {"a[0]": [640, 512, 8], "a[1]": [640, 512, 8], "b": [640, 512, 8]}
    size = PassSize(64, 1000)
    all_tokens = plan_pass(targets, Gradients(), size).sketched
    routed = plan_pass(targets, Gradients(), size, shares={"a[0]": 0.25, "a[1]": 0.25}).sketched
    assert routed.flops == all_tokens.flops / 2
    assert routed.held_bytes == all_tokens.held_bytes


def test_test_matrices_are_shared_by_dimension():
    targets = {"a": [640, 512, 8], "b": [640, 512, 8], "c": [512, 640, 8]}
    said = plan_pass(targets, Gradients(), PassSize(64, 1000))
    drawn = [draw_test_matrix(d, 80, seed=s) for d in (640, 512) for s in (0, 1)]
    assert said.test_matrix_bytes == sum(t.numel() * t.element_size() for t in drawn)


def test_bytes_grow_with_the_sum_of_the_dimensions_not_with_their_product():
    size = PassSize(64, 1000, n_processes=2)
    volumes = [
        plan_pass({"a": [n, n, 16]}, Gradients(), size) for n in (1024, 2048, 4096, 8192, 16384)
    ]
    for narrow, wide in itertools.pairwise(volumes):
        for name in ("held_bytes", "summed_bytes", "agreed_bytes"):
            assert getattr(wide.sketched, name) == 2 * getattr(narrow.sketched, name)
        assert wide.dense.held_bytes == 4 * narrow.dense.held_bytes


def test_nothing_is_kept_on_a_device_and_the_random_state_stays():
    state = torch.get_rng_state()
    plan_pass({"a": [640, 512, 8]}, Gradients(), PassSize(64, 1000))
    assert torch.equal(torch.get_rng_state(), state)
