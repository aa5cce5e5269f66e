"""The promises on a real language model, SmolLM2-135M, in float32 and bfloat16."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from trl import SFTConfig, SFTTrainer

from peft_gradinit import (
    CalibrationCallback,
    LoraOneConfig,
    export_adapter,
    init_report,
    load_for_training,
    pairs,
)
from peft_gradinit.recipes import load_processor, load_rows
from peft_gradinit.recipes.schema import DataSection, ModelSection
from tests.distributed.launch import launch
from tests.helpers import base_weights, relative_error, same_weights
from tests.smollm2.marks import needs_smollm2
from tests.smollm2.runs import INFO, LAST, base, logits, started, train_steps

ROOT = Path(__file__).parents[2]
pytestmark = [pytest.mark.slow, needs_smollm2]
DTYPES = {"float32": 1e-5, "bfloat16": 3e-2}
"""Relative error of logits that were computed in another order."""
every_dtype = pytest.mark.parametrize("dtype", DTYPES)


@pytest.mark.parametrize(
    ("method", "dtype"),
    [
        *((method, "float32") for method in INFO),
        *((method, "bfloat16") for method in ("lora_ga", "lora_one", "eva", "svfit")),
    ],
)
def test_start_disabling_training_saving_and_plain_reload(method, dtype, tmp_path):
    model = base(dtype)
    before, weights = logits(model), base_weights(model)
    peft_model = started(method, model)
    assert (init_report(peft_model) is None) == (method == "svfit")
    if INFO[method].preserves_output:
        assert relative_error(logits(peft_model), before) <= DTYPES[dtype]
    else:
        assert relative_error(logits(peft_model), before) > 1e-4
    losses = train_steps(peft_model)
    assert losses[1] < losses[0]
    trained = logits(peft_model)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), before)
    assert same_weights(weights, base_weights(peft_model.get_base_model()))
    peft_model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    plain = PeftModel.from_pretrained(base(dtype), tmp_path)
    assert relative_error(logits(plain), trained) <= DTYPES[dtype]
    again = load_for_training(base(dtype), tmp_path)
    assert torch.equal(logits(again), trained)


@every_dtype
def test_ranks_by_gradient_keep_the_trained_numbers(dtype, tmp_path):
    options = {"rank_allocation": "gradient_energy", "budget": "parameters", "rho": 4}
    peft_model = started("lora_one", base(dtype), **options)
    n_trained = sum(p.numel() for p in peft_model.parameters() if p.requires_grad)
    uniform = 4 * 30 * 10176
    assert uniform - (576 + 1536) < n_trained <= uniform
    assert len(set(init_report(peft_model).ranks().values())) > 3
    trained = (train_steps(peft_model), logits(peft_model))[1]
    peft_model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(base(dtype), tmp_path)
    assert relative_error(logits(plain), trained) <= DTYPES[dtype]


@every_dtype
def test_a_tied_head_as_a_target_leaves_the_embedding_alone(dtype, tmp_path):
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):  # PEFT's
        peft_model = started("lora_ga", base(dtype), target_modules=["lm_head", *LAST])
    assert {p.name for p in pairs(peft_model)} == {"lm_head", *(f"model.{n}" for n in LAST)}
    train_steps(peft_model)
    trained = logits(peft_model)
    # By default PEFT saves embeddings whole if a head is a target, since it may have been resized.
    peft_model.save_pretrained(tmp_path, save_embedding_layers=False)
    assert all("lora_" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        plain = PeftModel.from_pretrained(base(dtype), tmp_path)
    assert relative_error(logits(plain), trained) <= DTYPES[dtype]


@every_dtype
def test_an_export_for_servers_has_one_rank_and_the_same_function(dtype, tmp_path):
    options = {"rank_allocation": "gradient_energy", "rho": 2}
    peft_model = started("lora_ga", base(dtype), **options)
    train_steps(peft_model)
    export_adapter(peft_model, tmp_path / "served", "serving")
    config = json.loads((tmp_path / "served" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 16
    assert not config["rank_pattern"]
    assert not config["alpha_pattern"]
    plain = PeftModel.from_pretrained(base(dtype), tmp_path / "served")
    assert relative_error(logits(plain), logits(peft_model)) <= DTYPES[dtype]


def test_a_base_of_4_bits_starts_trains_and_reloads(tmp_path):
    pytest.importorskip("bitsandbytes")
    # On a CPU, layers of 4 bits that were evaluated pass no gradient on afterwards.
    before = logits(base(quantization="4bit"))
    peft_model = started("lora_ga", base(quantization="4bit"))
    losses = train_steps(peft_model)
    assert losses[1] < losses[0]
    trained = logits(peft_model)
    with peft_model.disable_adapter():
        assert torch.equal(logits(peft_model), before)
    peft_model.save_pretrained(tmp_path)
    plain = PeftModel.from_pretrained(base(quantization="4bit"), tmp_path)
    assert relative_error(logits(plain), trained) <= DTYPES["bfloat16"]


def test_a_start_on_a_base_of_4_bits_does_not_change_the_function():
    """On models of their own, for the reason of the test above."""
    pytest.importorskip("bitsandbytes")
    before = logits(base(quantization="4bit"))
    peft_model = started("lora_ga", base(quantization="4bit"))
    assert all(pair.B.abs().sum() > 0 for pair in pairs(peft_model))
    assert relative_error(logits(peft_model), before) <= DTYPES["bfloat16"]


@pytest.mark.parametrize(
    ("dtype", "targets"), [("float32", LAST), ("bfloat16", LAST), ("float32", "auto")]
)
def test_deferred_in_trl(dtype, targets, tmp_path):
    section = DataSection(path="embedded:functions", split="validation", n_train=8)
    arguments = SFTConfig(
        str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=2,
        max_length=192,
        report_to="none",
        bf16=False,
        gradient_checkpointing=False,
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    values = {"r": 4, "lora_alpha": 8, "target_modules": targets, "task_type": "CAUSAL_LM"}
    config = LoraOneConfig(**values, calibration="deferred")
    trainer = SFTTrainer(
        base(dtype),
        arguments,
        train_dataset=load_rows(section).select_columns(["prompt", "completion"]),
        processing_class=load_processor(ModelSection(name="embedded:smollm2")),
        peft_config=config,
    )
    callback = CalibrationCallback(trainer, max_batches=2, learning_rate="suggested")
    trainer.add_callback(callback)
    trainer.train()
    report = init_report(trainer.model)
    assert trainer.args.learning_rate == report.learning_rate.suggested
    assert (len(set(report.ranks().values())) > 3) == (targets == "auto")
    assert report.facts.n_batches == 2
    assert report.step.loss_after < report.step.loss_before


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("bfloat16", 3e-2)])
def test_two_processes_measure_what_one_does(dtype, tolerance):
    ((_, reference),) = launch("tests.smollm2.runs", f"products_{dtype}", 1, timeout=300)
    (kind, one), (_, other) = launch("tests.smollm2.runs", f"products_{dtype}", 2, timeout=300)
    assert kind == "value", one
    for name, want in reference.items():
        assert relative_error(one[name], want) <= tolerance, name
        assert torch.equal(one[name], other[name]), name


@every_dtype
def test_a_killed_run_resumes_to_the_same_adapter(dtype, tmp_path):
    def run(*arguments):
        command = [sys.executable, "-W", "ignore", "-m", "tests.smollm2.runs", *arguments]
        command += ["--dtype", dtype]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode

    assert run(str(tmp_path / "whole")) == 0
    assert run(str(tmp_path / "killed"), "--kill-after", "2") == -signal.SIGKILL
    assert run(str(tmp_path / "killed"), "--resume") == 0
    whole, resumed = (
        load_file(tmp_path / name / "final" / "adapter_model.safetensors")
        for name in ("whole", "killed")
    )
    assert whole.keys() == resumed.keys()
    for key, tensor in whole.items():
        assert torch.equal(resumed[key], tensor), key
