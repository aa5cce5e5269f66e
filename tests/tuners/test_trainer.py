"""A Trainer's checkpoints resume the same run, whichever way the model is rebuilt."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from peft_gradinit import load_for_training
from tests.helpers import adapted, logits, lora_ga, pad, pico_llama, rows_of, token_batches

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:.*were not in the expected|.*missing keys.*"),
]


def trainer_of(model, directory, **options):
    values = {
        "max_steps": 6,
        "save_steps": 3,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    rows = rows_of(token_batches())
    arguments = TrainingArguments(str(directory), **{**values, **options})
    return Trainer(model, arguments, train_dataset=rows, eval_dataset=rows[:4], data_collator=pad)


def losses_of(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


def deferred(directory):
    return adapted(pico_llama(), lora_ga(calibration="deferred"))


@pytest.mark.parametrize(
    "rebuild", [deferred, lambda d: load_for_training(pico_llama(), d)], ids=["deferred", "load"]
)
def test_resumed_run_has_the_losses_of_the_uninterrupted_one(rebuild, tmp_path):
    whole = trainer_of(adapted(pico_llama()), tmp_path)
    whole.train()
    checkpoint = tmp_path / "checkpoint-3"
    resumed = trainer_of(rebuild(checkpoint), tmp_path / "resumed")
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses_of(resumed) == losses_of(whole)
    assert torch.equal(logits(resumed.model), logits(whole.model))


def test_best_model_is_loaded_at_the_end(tmp_path):
    # The loss falls, so that the highest one, taken for the best, is that of an earlier checkpoint.
    options = {"eval_strategy": "steps", "eval_steps": 3, "load_best_model_at_end": True}
    chosen = {"metric_for_best_model": "eval_loss", "greater_is_better": True}
    trainer = trainer_of(adapted(pico_llama()), tmp_path, **options, **chosen)
    trainer.train()
    best = trainer.state.best_model_checkpoint
    assert best.endswith("checkpoint-3")
    live = load_for_training(pico_llama(), best)
    assert torch.equal(logits(trainer.model), logits(live))
