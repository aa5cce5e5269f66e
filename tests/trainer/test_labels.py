"""The labels of a training step are counted as the loss counts them, and change the rate that is suggested."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback

from peft_gradinit import CalibrationCallback, suggest_learning_rate
from peft_gradinit.trainer.labels import labels_per_step
from tests.helpers import pad, pico_llama
from tests.trainer.runs import ROWS, trainer_of

N_ROWS = len(ROWS)


def lora():
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", lora_dropout=0.0
    )
    return get_peft_model(pico_llama(), config)


def collator(labels):
    """Batches whose labels are those that a function makes of the ordinary ones."""

    def collate(rows):
        batch = pad(rows)
        made = labels(batch.pop("labels"))
        return batch | (made if isinstance(made, dict) else {"labels": made})

    return collate


def counted(tmp_path, labels, data=ROWS, names=None, **options):
    options = {"cls": Trainer, "collator": collator(labels), "label_names": names, **options}
    trainer = trainer_of(tmp_path, model=lora(), data=data, **options)
    return labels_per_step(trainer, trainer.model)


def masked(labels):
    return torch.where(torch.arange(labels.shape[1]) < 3, labels, -100)


@pytest.mark.parametrize(
    ("labels", "names", "want"),
    [
        (lambda y: y[:, 0], None, 4),  # a class for each row
        (lambda y: y[:, 0].float(), None, 4),  # a number to predict
        (lambda y: torch.zeros(len(y), 7), None, 4),  # several classes at once
        (masked, None, 12),  # three tokens of each row
        (lambda y: {"start": y[:, 0], "end": y[:, 0]}, ["start", "end"], 8),  # where an answer is
        (lambda y: {}, None, None),
        (lambda y: torch.full_like(y, -100), None, None),
    ],
)
def test_labels_with_loss_are_counted(labels, names, want, tmp_path):
    assert counted(tmp_path, labels, names=names) == want


def test_accumulated_batches_count(tmp_path):
    assert counted(tmp_path, masked, gradient_accumulation_steps=5) == 60


def test_padding_does_not_count(tmp_path):
    """All rows are read: six batches have them all, of which four are."""
    mean = sum(len(row) for row in ROWS) / N_ROWS
    found = counted(tmp_path, lambda y: y)
    assert found == pytest.approx(4 * mean, rel=0.15)
    assert found < 4 * max(len(row) for row in ROWS)


class Stream(IterableDataset):
    """Rows that can be read once."""

    def __init__(self):
        self.rows = iter(ROWS)  # a lock cannot be copied, and neither can what holds it
        self.lock = __import__("threading").Lock()

    def __iter__(self):
        yield from self.rows


def test_a_stream_that_can_be_read_once_is_left_alone(tmp_path):
    stream = Stream()
    assert counted(tmp_path, lambda y: y, data=stream) is None
    assert len(list(stream)) == N_ROWS


class Rates(TrainerCallback):
    def __init__(self):
        self.first = None

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.first = self.first or optimizer.param_groups[0]["lr"]


def trained_at(trainer):
    rates = Rates()
    trainer.add_callback(CalibrationCallback(trainer, learning_rate="suggested"))
    trainer.add_callback(rates)
    trainer.train()
    return rates.first


@pytest.mark.parametrize("n_accumulated", [1, 2, 40])
def test_the_callback_trains_at_the_rate_of_the_labels(n_accumulated, tmp_path):
    options = {"collator": collator(masked), "cls": Trainer, "max_steps": 1}
    trainer = trainer_of(
        tmp_path, model=lora(), gradient_accumulation_steps=n_accumulated, **options
    )
    whole = suggest_learning_rate(trainer.model).suggested
    want = whole * min(1, (12 * n_accumulated / 200) ** 0.25)
    assert trained_at(trainer) == pytest.approx(want)


def test_counting_leaves_the_batches_of_training_alone(tmp_path):
    seen = []
    for counts in (False, True):
        torch.manual_seed(3)
        trainer = trainer_of(tmp_path / str(counts), model=lora())
        if counts:
            labels_per_step(trainer, trainer.model)
        trainer.train()
        seen.append(trainer.batches)
    assert len(seen[0]) == len(seen[1]) > 1
    assert all(torch.equal(one, two) for one, two in zip(*seen, strict=True))
