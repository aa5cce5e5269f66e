"""`InitReport` says what was done, in numbers that can be checked."""

import json

import pytest
import torch

from peft_gradinit import InitReport
from tests.helpers import adapted, anchors, lora_ga, pico_gpt2, pico_llama, quiet, token_batches

MODELS = [pytest.param(pico_llama, id="llama"), pytest.param(pico_gpt2, id="gpt2-conv1d")]


def report_of(peft_model):
    return peft_model.base_model.init_report["default"]


def test_report_prints_a_summary_and_one_line_a_module():
    text = str(report_of(adapted(pico_llama(), lora_ga(target_modules=["q_proj"]))))
    summary, timing, rate, blank, header, *lines = text.splitlines()
    assert summary.startswith("LoRA-GA: 2 modules from 12 sequences (")
    assert "ended by end of data), loss 4." in summary
    assert timing.startswith("time ")
    assert "drift of the output " in timing
    assert rate.startswith("learning rate to begin with ")
    assert blank == ""
    assert header.split() == ["module", "method", "r", "energy", "|sB0A0|/|W|", "note"]
    assert [line.split()[:3] for line in lines] == [
        ["model.layers.0.self_attn.q_proj", "LoRA-GA", "4"],
        ["model.layers.1.self_attn.q_proj", "LoRA-GA", "4"],
    ]


def test_report_survives_json():
    report = report_of(adapted(pico_llama()))
    assert InitReport.from_dict(json.loads(json.dumps(report.to_dict()))) == report


@pytest.mark.parametrize("estimator", ["dense", "sketch"])
@pytest.mark.parametrize("make", MODELS)
def test_numbers_of_the_report_are_those_of_the_adapter(make, estimator):
    config = lora_ga(calibration=quiet(token_batches(), estimator=estimator), use_rslora=True)
    peft_model = adapted(make(), config)
    report, found = report_of(peft_model), anchors(peft_model)
    assert report.drift <= 1e-5  # float32 rounding of two cancelling halves
    assert [line.name for line in report.modules] == list(found)
    for line in report.modules:
        A0, B0 = found[line.name]
        weight = make().get_submodule(line.name).weight
        want = (8 / 2) * torch.linalg.matrix_norm(B0 @ A0) / torch.linalg.matrix_norm(weight)
        assert line.start_norm == pytest.approx(want.item(), rel=1e-5)
        assert 0 < line.captured_energy <= 1
        assert (line.r, line.requested_r, line.fallback) == (4, 4, "")


@pytest.mark.filterwarnings("ignore:LoRA-GA needs")
def test_lowered_rank_is_in_the_report():
    lines = report_of(adapted(pico_llama(), lora_ga(r=14))).modules
    notes = {line.name.split(".")[-1]: (line.r, line.requested_r, line.fallback) for line in lines}
    assert notes["k_proj"] == (12, 14, "r lowered from 14")
    assert notes["q_proj"] == (14, 14, "")
