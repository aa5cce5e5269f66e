"""Two adapters, two calibrations: angles, effective ranks, distance."""

import math

import pytest
import torch
from peft import get_peft_model
from torch import nn

from peft_gradinit import EvaConfig, LoraGAConfig, LoraOneConfig, calibrate, init_report
from peft_gradinit.analysis import (
    LayerComparison,
    compare_adapters,
    compare_calibrations,
    suggested_ranks,
    summary,
)
from peft_gradinit.errors import AdapterError, ConfigError
from peft_gradinit.linalg import Factors
from peft_gradinit.records import read_adapter, write_adapter
from tests.helpers import lora_ga, pico_llama, quiet, token_batches
from tests.saved.adapters import lora_config, overwriting_start, saved_lora


def test_an_adapter_is_the_same_as_itself(tmp_path):
    adapter = read_adapter(saved_lora(tmp_path / "lora"))
    for line in compare_adapters(adapter, adapter).layers:
        assert line.cosine == pytest.approx(1, abs=1e-6)
        assert line.distance == pytest.approx(0, abs=1e-3)
        assert max(line.input_angles + line.output_angles) < 1e-3
        assert line.effective_ranks[0] == line.effective_ranks[1]


def test_an_update_that_is_zero_but_for_rounding_has_no_directions(tmp_path):
    start = get_peft_model(pico_llama(), lora_ga())
    start.save_pretrained(tmp_path / "start")
    trained = read_adapter(saved_lora(tmp_path / "lora"))
    started = read_adapter(tmp_path / "start")
    for line in compare_adapters(started, started).layers:
        assert (line.cosine, line.distance, line.effective_ranks) == (0, 0, (0, 0))
        assert not line.input_angles + line.output_angles
    assert {line.distance for line in compare_adapters(started, trained).layers} == {math.inf}
    assert {line.distance for line in compare_adapters(trained, started).layers} == {1}
    assert summary(compare_adapters(started, started).layers)["median cosine of the updates"] == 0


def test_known_angles_are_found(tmp_path):
    adapter = read_adapter(saved_lora(tmp_path / "lora"))
    layers = {}
    for name, update in adapter.layers.items():
        n = update.A.shape[1]
        A = torch.zeros(2, n)
        A[0, 0], A[1, 1] = 1, 1
        layers[name] = Factors(A, update.B[:, :2])
    write_adapter(tmp_path / "one", adapter, layers)
    for name, update in layers.items():
        A = torch.zeros_like(update.A)
        A[0, 0] = 1
        A[1, 1], A[1, 2] = math.cos(0.5), math.sin(0.5)
        layers[name] = Factors(A, update.B)
    write_adapter(tmp_path / "other", adapter, layers)
    pair = [read_adapter(tmp_path / name) for name in ("one", "other")]
    for line in compare_adapters(*pair).layers:
        assert line.input_angles == pytest.approx([0, 0.5], abs=1e-3)
        assert line.output_angles == pytest.approx([0, 0], abs=1e-3)


def test_cosine_and_distance_are_those_of_the_matrices(tmp_path):
    one, other = (read_adapter(saved_lora(tmp_path / str(s), seed=s)) for s in (0, 1))
    lines = compare_adapters(one, other).layers
    assert all(abs(line.cosine) < 0.9 for line in lines)
    for line in lines:
        first, second = one.layers[line.name].matrix(), other.layers[line.name].matrix()
        cosine = (first * second).sum() / first.norm() / second.norm()
        assert line.cosine == pytest.approx(cosine.item(), abs=1e-5)
        assert line.distance == pytest.approx(
            ((first - second).norm() / first.norm()).item(), rel=1e-4
        )


def test_nothing_in_common_is_an_error(tmp_path):
    one = read_adapter(saved_lora(tmp_path / "q", target_modules=["q_proj"]))
    other = read_adapter(saved_lora(tmp_path / "v", target_modules=["v_proj"]))
    with pytest.raises(AdapterError, match="no layer in common"):
        compare_adapters(one, other)


def test_layers_that_one_of_two_has_are_named(tmp_path):
    one = read_adapter(saved_lora(tmp_path / "qk", target_modules=["q_proj", "k_proj"]))
    other = read_adapter(saved_lora(tmp_path / "qv", target_modules=["q_proj", "v_proj"]))
    calibrations = [
        calibrate(pico_llama(), lora_ga(target_modules=names), quiet(token_batches()))
        for names in (["q_proj", "k_proj"], ["q_proj", "v_proj"])
    ]
    for compared in (compare_adapters(one, other), compare_calibrations(*calibrations)):
        shared = [line.name for line in compared.layers]
        for names, kind in (
            (shared, "q_proj"),
            (compared.only_in_first, "k_proj"),
            (compared.only_in_second, "v_proj"),
        ):
            assert {name.rpartition(".")[2] for name in names} == {kind}


def test_the_summary_is_of_medians():
    lines = [
        LayerComparison(str(i), (1 + i, 2 + i), (0.1, angle), (angle,), cosine=angle)
        for i, angle in enumerate((0.2, 0.3, 1.0))
    ]
    middle = math.degrees(0.3)
    assert summary(lines) == {
        "median effective rank of the first": 2,
        "median effective rank of the second": 3,
        "median of the largest input angles, degrees": pytest.approx(middle),
        "median of the largest output angles, degrees": pytest.approx(middle),
        "median cosine of the updates": pytest.approx(0.3),
    }


def test_adapters_of_an_overwritten_base_are_refused(tmp_path):
    overwriting_start(tmp_path, lora_config("pissa"))
    plain, pissa = read_adapter(saved_lora(tmp_path / "lora")), read_adapter(tmp_path / "trained")
    with pytest.raises(AdapterError, match="convert"):
        compare_adapters(plain, pissa)


def test_calibrations_on_more_data_come_closer():
    model, config = pico_llama(), lora_ga(calibration="deferred")

    def of(n, seed):
        return calibrate(model, config, quiet(token_batches(n, seed=seed), estimator="dense"))

    reference = of(192, 7)
    few, many = (summary(compare_calibrations(of(n, 1), reference).layers) for n in (4, 96))
    key = "median of the largest input angles, degrees"
    assert many[key] < few[key] <= 90
    assert compare_calibrations(reference, reference).layers[0].output_angles[-1] < 1e-3


def test_suggestions_keep_the_sum_and_follow_the_energy():
    result = calibrate(
        pico_llama(), lora_ga(calibration="deferred"), quiet(token_batches(), estimator="dense")
    )
    ranks = suggested_ranks(result, 2)
    assert sum(ranks.values()) == 2 * len(ranks)
    assert 1 <= min(ranks.values()) < max(ranks.values()) <= 4
    # A rank of LoRA-GA takes two triplets.
    gains = {n: t.S.square().unflatten(0, (-1, 2)).sum(1) for n, t in result.triplets.items()}
    kept = min(gains[n][r - 1].item() for n, r in ranks.items() if r > 1)
    lost = max(gains[n][r].item() for n, r in ranks.items() if r < 4)
    assert kept >= lost
    with pytest.raises(ConfigError, match="between 1 and 4, got 9"):
        suggested_ranks(result, 9)


def test_layers_of_other_shapes_are_named(tmp_path):
    wide = pico_llama(intermediate_size=96)
    model = get_peft_model(wide, lora_config())
    model.save_pretrained(tmp_path / "wide")
    adapters = read_adapter(saved_lora(tmp_path / "lora")), read_adapter(tmp_path / "wide")
    name = r"layers\.0\.mlp\.down_proj is \(48, 112\) in "
    with pytest.raises(AdapterError, match=name + r".* and \(48, 96\) in .*one base model"):
        compare_adapters(*adapters)
    calibrations = [
        calibrate(base, lora_ga(target_modules=["down_proj"]), quiet(token_batches()))
        for base in (pico_llama(), pico_llama(intermediate_size=96))
    ]
    with pytest.raises(AdapterError, match=name + r"the first .* \(48, 96\) in the second"):
        compare_calibrations(*calibrations)


def test_suggestions_beside_a_layer_of_few_outputs():
    """A head of two classes has two ranks at most, and bounds no other layer."""
    model = nn.Sequential()
    model.body, model.head = nn.Linear(24, 24), nn.Linear(24, 2)
    batches = [{"input": torch.randn(8, 24)} for _ in range(4)]

    def loss_fn(model, batch):
        return model(batch["input"]).square().mean() + model(batch["input"])[:, 0].mean()

    config = LoraOneConfig(r=8, target_modules=["body", "head"], calibration="deferred")
    result = calibrate(model, config, quiet(batches, loss_fn=loss_fn, estimator="dense"))
    ranks = suggested_ranks(result, 4)
    assert sum(ranks.values()) <= 8
    assert ranks["head"] <= 2 < ranks["body"]


@pytest.mark.parametrize(
    ("config_cls", "allocation"),
    [(LoraGAConfig, "gradient_energy"), (LoraOneConfig, "gradient_energy"), (EvaConfig, ...)],
)
def test_suggestions_are_what_a_config_allocates(config_cls, allocation):
    options = {"r": 2, "target_modules": "all-linear", "task_type": "CAUSAL_LM", "min_rank": 1}
    allocated = {} if allocation is ... else {"rank_allocation": allocation}
    config = config_cls(**options, **allocated, calibration=quiet(token_batches()))
    result = calibrate(pico_llama(), config, config.calibration)
    report = init_report(get_peft_model(pico_llama(), config))
    assert len(set(report.ranks().values())) > 1
    assert suggested_ranks(result, 2) == report.ranks()
