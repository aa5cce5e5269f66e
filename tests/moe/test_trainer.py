"""A Trainer resumes adapters on experts from its checkpoints."""

import pytest
import torch
from peft import get_peft_model

from peft_gradinit import LoraGAConfig, load_for_training
from tests.helpers import logits, quiet, token_batches
from tests.moe.models import BOTH, mixtral
from tests.trainers import losses_of, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:`gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory.*"),
    pytest.mark.filterwarnings("ignore:.*were not in the expected|.*missing keys.*"),
]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_resumed_run_has_the_losses_of_the_uninterrupted_one(checkpointing, tmp_path):
    options = {
        "gradient_checkpointing": checkpointing,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
    }
    config = LoraGAConfig(
        r=3,
        target_modules=["q_proj"],
        target_parameters=BOTH,
        calibration=quiet(token_batches()),
    )
    whole = trainer_of(get_peft_model(mixtral(), config), tmp_path, **options)
    whole.train()
    checkpoint = tmp_path / "checkpoint-3"
    live = load_for_training(mixtral(), checkpoint)
    resumed = trainer_of(live, tmp_path / "resumed", **options)
    resumed.train(resume_from_checkpoint=str(checkpoint))
    assert losses_of(resumed) == losses_of(whole)
    assert torch.equal(logits(resumed.model), logits(whole.model))
