"""A Trainer's checkpoints resume the same run, whichever way the model is rebuilt."""

import pytest
import torch

from peft_gradinit import load_for_training
from tests.helpers import adapted, logits, lora_ga, pico_llama
from tests.trainers import losses_of, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:.*were not in the expected|.*missing keys.*"),
]


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
