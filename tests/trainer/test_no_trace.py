"""A run with the callback is the run that it would be without the pass, bit for bit."""

import random

import datasets
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import TrainingArguments

from peft_gradinit import CalibrationCallback
from peft_gradinit.errors import DataError, NotInitializedError
from tests.helpers import adapted, lora_ga, pad, pico_llama
from tests.trainer.runs import (
    ROWS,
    Observed,
    calibrated_run,
    logs_of,
    mostly_slow,
    same_state,
    trainer_of,
    uncalibrated_run,
)


class Stream(IterableDataset):
    """Draws samples for as long as it is asked, from a state of its own, like a socket or a tap."""

    def __init__(self):
        self.random = random.Random(3)

    def __iter__(self):
        while True:
            yield ROWS[self.random.randrange(len(ROWS))]


class Once(IterableDataset):
    """Reads something that is open already."""

    def __init__(self):
        self.rows = (row for row in ROWS)

    def __iter__(self):
        return self.rows


class Masking:
    """A collator that masks tokens at random and makes its generator when it is first used."""

    def __init__(self):
        self.generator = None

    def __call__(self, rows):
        if self.generator is None:
            self.generator = torch.Generator().manual_seed(11)
        batch = pad(list(rows))
        hidden = torch.rand(batch["labels"].shape, generator=self.generator) < 0.3
        batch["labels"] = batch["labels"].masked_fill(hidden, -100)
        batch["input_ids"] = batch["input_ids"].masked_fill(hidden, 2)
        return batch


class OwnLoader(Observed):
    """Always the same loader, shuffled by a generator of its own."""

    def get_train_dataloader(self):
        if not hasattr(self, "loader"):
            generator = torch.Generator().manual_seed(5)
            self.loader = DataLoader(
                self.train_dataset, 4, shuffle=True, generator=generator, collate_fn=pad
            )
        return self.loader


def streamed(shuffled):
    def samples():
        yield from ({"input_ids": row.tolist()} for row in ROWS)

    data = datasets.IterableDataset.from_generator(samples)
    return data.shuffle(seed=1, buffer_size=6) if shuffled else data


def pad_samples(samples):
    return pad([torch.tensor(sample["input_ids"]) for sample in samples])


BY_LENGTH = {"train_sampling_strategy": "group_by_length"}
if "train_sampling_strategy" not in TrainingArguments.__dataclass_fields__:
    BY_LENGTH = {"group_by_length": True}  # its name before Transformers 5.2

SETUPS = {
    "plain": dict,
    "several-epochs": lambda: {"max_steps": 14},
    "unseeded-sampler": lambda: {"accelerator_config": {"use_seedable_sampler": False}},
    "length-groups": lambda: {
        **BY_LENGTH,
        "data": [{"input_ids": row.tolist()} for row in ROWS],
        "collator": pad_samples,
    },
    "worker": lambda: {"dataloader_num_workers": 1, "max_steps": 3},
    "accumulation": lambda: {"gradient_accumulation_steps": 3},
    "dropout": lambda: {"lora_dropout": 0.3},
    "bf16-autocast": lambda: {"bf16": True},
    "checkpointing": lambda: {"gradient_checkpointing": True},
    "reentrant": lambda: {
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": True},
    },
    "neftune": lambda: {"neftune_noise_alpha": 5.0},
    "own-stream": lambda: {"data": Stream()},
    "streamed": lambda: {"data": streamed(shuffled=False), "collator": pad_samples},
    "streamed-shuffled": lambda: {"data": streamed(shuffled=True), "collator": pad_samples},
    "masking-collator": lambda: {"collator": Masking()},
    "own-loader": lambda: {"cls": OwnLoader},
}


QUICK = [
    "plain",
    "accumulation",
    "dropout",
    "reentrant",
    "own-stream",
    "masking-collator",
    "own-loader",
]


@pytest.mark.parametrize("setup", mostly_slow(SETUPS, quick=QUICK))
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_run_is_the_one_without_a_pass(setup, tmp_path):
    trainer = trainer_of(tmp_path, **SETUPS[setup]())
    got = calibrated_run(trainer, max_batches=5)
    other = trainer_of(tmp_path, **SETUPS[setup]())
    want = uncalibrated_run(other, got.start)
    assert all(torch.equal(a, b) for a, b in zip(trainer.batches, other.batches, strict=True))
    assert logs_of(trainer) == logs_of(other)
    assert (got.n_logs, trainer.by_mode) == (want.n_logs, other.by_mode)
    assert trainer.n_losses == other.n_losses
    assert same_state(trainer.model.state_dict(), other.model.state_dict())
    assert torch.equal(got.rng, want.rng)
    assert got.initial_seed == want.initial_seed


def test_optimiser_keeps_its_parameters_and_has_no_state(tmp_path):
    trainer = trainer_of(tmp_path)
    live = [id(p) for p in trainer.model.parameters() if p.requires_grad]
    recorder = calibrated_run(trainer)
    assert sorted(recorder.optimizer_parameters) == sorted(live)
    assert recorder.optimizer_state == {}
    assert live == [id(p) for p in trainer.model.parameters() if p.requires_grad]
    assert trainer.accelerator._dataloaders == [trainer.callback_handler.train_dataloader]


class Failing(Observed):
    """Its loss fails in the second batch."""

    fails = True

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.state.num_input_tokens_seen += 1
        if self.fails and self.n_losses == 2:
            raise ArithmeticError("the user's own")
        return loss


def test_failure_in_the_pass_changes_nothing_and_can_be_repeated(tmp_path):
    trainer = trainer_of(tmp_path, cls=Failing, gradient_checkpointing=True)
    trainer.add_callback(CalibrationCallback(trainer))
    model, gradients = trainer.model.train(), trainer.accelerator.gradient_state
    references = gradients.dataloader_references
    before = {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "trainable": [p.requires_grad for p in model.parameters()],
    }
    with pytest.raises(ArithmeticError, match="the user's own"):
        trainer.train()
    assert same_state(model.state_dict(), before["state"])
    assert [m.training for m in model.modules()] == before["modes"]
    assert [p.requires_grad for p in model.parameters()] == before["trainable"]
    assert all(p.grad is None for p in model.parameters())
    assert (trainer.n_losses, trainer.batches, trainer.state.num_input_tokens_seen) == (0, [], 0)
    assert (trainer.state.log_history, trainer.by_mode) == ([], {"train": [], "eval": []})
    assert gradients.dataloader_references == references
    with torch.no_grad():  # deferred still, so it evaluates as the base model
        model(input_ids=torch.ones(1, 3, dtype=torch.long))
    trainer.fails = False
    trainer.train()
    assert len(trainer.batches) == 5


def test_stream_that_can_be_read_only_once_is_refused_untouched(tmp_path):
    data = Once()
    trainer = trainer_of(tmp_path, data=data)
    trainer.add_callback(CalibrationCallback(trainer))
    with pytest.raises(
        DataError, match=r"\(Once\) are a stream that cannot be copied.*calibration=path"
    ):
        trainer.train()
    assert len(list(data)) == len(ROWS)


def test_without_the_callback_training_is_refused_by_a_message_that_names_it(tmp_path):
    trainer = trainer_of(tmp_path, model=adapted(pico_llama(), lora_ga(calibration="deferred")))
    with pytest.raises(
        NotInitializedError, match=r"add_callback\(.*CalibrationCallback\(trainer\)"
    ):
        trainer.train()
