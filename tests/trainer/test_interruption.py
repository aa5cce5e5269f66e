"""Checkpoints suffice to go on, whatever ended the run; half a checkpoint is not taken for one."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import Trainer

from peft_gradinit import load_for_training
from peft_gradinit.errors import DataError
from peft_gradinit.tuners import deferred_adapters
from tests.helpers import adapted, base_weights, logits, lora_ga, pico_llama, same_weights
from tests.trainer.interrupted_run import METHODS, N_BYTES, losses_of, make_trainer
from tests.trainer.runs import mostly_slow, trainer_of

pytestmark = pytest.mark.filterwarnings("ignore:CalibrationCallback has nothing to do")
ROOT = Path(__file__).parent.parent.parent
WRITTEN = ["adapter_config.json", ".gradinit.json.", "trainer_state.json"]
"""Files of a checkpoint in the order in which they are written, the weights before them."""


def in_process(method, directory, *options):
    command = [sys.executable, "-m", "tests.trainer.interrupted_run", method, str(directory)]
    return subprocess.run(
        [*command, *options], cwd=ROOT, capture_output=True, text=True, check=False, timeout=300
    )


def printed_losses(run):
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_run_resumes_in_a_new_process_with_the_losses_of_the_whole_one(method, tmp_path):
    whole = make_trainer(method, tmp_path / "whole")
    whole.train()
    killed = in_process(method, tmp_path / "run", "--kill-after", "5")
    assert killed.returncode == -signal.SIGKILL
    assert {p.name for p in (tmp_path / "run").iterdir()} == {"checkpoint-2", "checkpoint-4"}
    losses = printed_losses(in_process(method, tmp_path / "run", "--resume"))
    assert losses == losses_of(whole)
    assert len(set(losses)) == 6


@pytest.mark.slow
@pytest.mark.parametrize("file", WRITTEN)
def test_half_a_checkpoint_is_refused_and_the_one_before_it_resumes(file, tmp_path):
    whole = make_trainer("LoRA-GA", tmp_path / "whole")
    whole.train()
    run = tmp_path / "run"
    killed = in_process("LoRA-GA", run, "--kill-in-file", str(Path("checkpoint-4") / file))
    assert killed.returncode == -signal.SIGKILL
    half = run / "checkpoint-4"
    assert (half / "adapter_model.safetensors").exists()
    (torn,) = half.glob(f"{file}*")
    if torn.is_dir():  # this package writes in a folder of its own
        (torn,) = torn.iterdir()
    assert torn.stat().st_size == N_BYTES
    resumed = in_process("LoRA-GA", run, "--resume")
    assert resumed.returncode == 1
    refused = "JSONDecodeError" if file == "trainer_state.json" else "trainer_state.json"
    assert refused in resumed.stderr.splitlines()[-1]
    if file != "trainer_state.json":  # the adapter itself is complete by then
        with pytest.raises(DataError, match=r"holds no gradinit\.json"):
            load_for_training(pico_llama(), half)
    shutil.rmtree(half)
    assert printed_losses(in_process("LoRA-GA", run, "--resume")) == losses_of(whole)


@pytest.mark.parametrize("method", METHODS)
def test_checkpoints_of_every_method_resume_and_load(method, tmp_path):
    whole = make_trainer(method, tmp_path)
    base = base_weights(whole.model)
    whole.train()
    resumed = make_trainer(method, tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert losses_of(resumed) == losses_of(whole)
    assert torch.equal(logits(resumed.model), logits(whole.model))
    live = load_for_training(pico_llama(), tmp_path / "checkpoint-6")
    assert torch.equal(logits(live), logits(whole.model))
    assert same_weights(base_weights(whole.model), base)


@pytest.mark.parametrize("method", mostly_slow(METHODS, quick=["LoRA-GA"]))
def test_loaded_adapter_goes_on_in_a_trainer(method, tmp_path):
    """`load_for_training` in place of a config: for scripts that have no data for one any more."""
    whole = make_trainer(method, tmp_path)
    whole.train()
    checkpoint = tmp_path / "checkpoint-4"
    live = load_for_training(pico_llama(), checkpoint)
    resumed = trainer_of(tmp_path / "resumed", model=live, max_steps=6, cls=type(whole))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses_of(resumed) == losses_of(whole)


def test_layers_of_rank_0_are_among_what_resumes(tmp_path):
    trainer = make_trainer("EVA", tmp_path)
    ranks = trainer.model.base_model.init_report["default"].ranks()
    assert 0 in ranks.values()
    assert max(ranks.values()) > 2
    trainer.train()
    live = load_for_training(pico_llama(), tmp_path / "checkpoint-6")
    names = {n for n, p in live.named_parameters() if p.requires_grad}
    assert names == {n for n, p in trainer.model.named_parameters() if p.requires_grad}


class SecondStepIsBest(Trainer):
    def evaluate(self, *args, **kwargs):
        return {**super().evaluate(*args, **kwargs), "eval_loss": abs(self.state.global_step - 2)}


@pytest.mark.filterwarnings("ignore:mtime may not be reliable")  # Transformers before 5.2
@pytest.mark.parametrize("method", mostly_slow(METHODS, quick=["EVA"]))
def test_best_model_and_limit_of_checkpoints(method, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    trainer = make_trainer(method, tmp_path, SecondStepIsBest, save_total_limit=2, **options)
    trainer.train()
    assert {p.name for p in tmp_path.glob("checkpoint-*")} == {"checkpoint-2", "checkpoint-6"}
    best = load_for_training(pico_llama(), tmp_path / "checkpoint-2")
    assert torch.equal(logits(trainer.model), logits(best))
    last = load_for_training(pico_llama(), tmp_path / "checkpoint-6")
    assert not torch.equal(logits(trainer.model), logits(last))


@pytest.mark.parametrize("content", [None, "{", "[]"], ids=["missing", "cut", "other"])
def test_trainer_resumes_without_our_file_and_loading_says_what_is_wrong(content, tmp_path):
    whole = make_trainer("LoRA-GA", tmp_path)
    whole.train()
    file = tmp_path / "checkpoint-4" / "gradinit.json"
    file.unlink()
    if content is not None:
        file.write_text(content)
    resumed = make_trainer("LoRA-GA", tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(file.parent))
    assert losses_of(resumed) == losses_of(whole)
    with pytest.raises(DataError, match=r"gradinit\.json"):
        load_for_training(pico_llama(), file.parent)


def test_cut_weights_are_refused_and_the_model_waits_as_before(tmp_path):
    make_trainer("LoRA-GA", tmp_path).train()
    file = tmp_path / "checkpoint-4" / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(DataError, match=r"cannot be read.*the checkpoint before"):
        load_for_training(pico_llama(), file.parent)
    model = adapted(pico_llama(), lora_ga(calibration="deferred"))
    trainer = trainer_of(tmp_path / "resumed", model=model)
    with pytest.raises(Exception, match=r"incomplete metadata|deserializing"):
        trainer.train(resume_from_checkpoint=str(file.parent))
    assert deferred_adapters(model) == ["default"]
