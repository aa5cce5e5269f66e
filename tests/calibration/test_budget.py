"""Budgets are in units that the batches have: tokens, or sequences that are not of tokens."""

import pytest
import torch
from torch import nn
from transformers.utils import ModelOutput

from peft_gradinit import Calibration
from peft_gradinit.calibration.feed.budget import Budget, lengths_within
from peft_gradinit.calibration.feed.tokens import has_tokens, n_input_tokens
from peft_gradinit.calibration.passes.progress import expected
from peft_gradinit.calibration.spec import DEFAULT_MAX_SEQUENCES
from tests.calibration.passes import run_pass
from tests.helpers import pico_llama, quiet

LENGTH = 20_000


class Listener(nn.Module):
    """Classifies audio clips."""

    def __init__(self):
        super().__init__()
        self.conv, self.a = nn.Conv1d(1, 8, 400, 400), nn.Linear(8, 3)

    def forward(self, input_values, attention_mask=None, labels=None):
        logits = self.a(self.conv(input_values[:, None]).mT).mean(1)
        return ModelOutput(loss=nn.functional.cross_entropy(logits, labels), logits=logits)


def clips(n, *, mask, batch_size=4):
    for _ in range(n // batch_size):
        x = torch.randn(batch_size, LENGTH if mask else 800)
        batch = {"input_values": x, "labels": torch.zeros(batch_size, dtype=torch.long)}
        yield {**batch, "attention_mask": torch.ones_like(x).long()} if mask else batch


@pytest.mark.parametrize("mask", [True, False])
def test_samples_of_audio_are_not_tokens(mask):
    _, facts = run_pass(Listener(), clips(16, mask=mask))
    assert (facts.n_sequences, facts.n_tokens, facts.stopped_by) == (16, 16, "end of data")


@pytest.mark.parametrize("batch_size", [4, 50])
def test_rows_that_are_not_tokens_have_a_default_budget_of_their_own(batch_size):
    _, facts = run_pass(Listener(), clips(300, mask=False, batch_size=batch_size))
    whole = -(-DEFAULT_MAX_SEQUENCES // batch_size) * batch_size  # the model is not known
    assert (facts.n_sequences, facts.stopped_by) == (whole, "max_sequences")


@pytest.mark.parametrize(
    ("options", "n"), [({"max_tokens": 200}, 200), ({"max_batches": 40}, 160), ({}, 128)]
)
def test_a_budget_that_is_given_takes_the_place_of_the_default(options, n):
    _, facts = run_pass(Listener(), clips(300, mask=False), **options)
    assert facts.n_sequences == n


IDS = torch.ones(2, 5, dtype=torch.long)
AUDIO = torch.ones(2, 400)


@pytest.mark.parametrize(
    ("batch", "are_tokens", "n"),
    [
        ({"input_ids": IDS}, True, 10),
        ({"inputs_embeds": torch.ones(2, 5, 3)}, True, 10),
        ({"attention_mask": IDS, "x": AUDIO}, True, 10),
        ({"input_values": AUDIO, "attention_mask": AUDIO.long()}, False, 2),
        ({"input_features": torch.ones(2, 8, 9), "attention_mask": AUDIO.long()}, False, 2),
        ({"pixel_values": torch.ones(2, 3, 4, 4)}, False, 2),
        ({"input_ids": IDS, "input_values": AUDIO, "attention_mask": IDS}, True, 10),
        ({"series": AUDIO}, False, 2),
        ((IDS, IDS), True, 10),
        ((AUDIO,), False, 2),
        ("a text", False, 1),
    ],
)
def test_tokens_are_known_by_the_names_of_the_tensors(batch, are_tokens, n):
    assert has_tokens(batch) is are_tokens
    assert n_input_tokens(batch) == n


def long_texts(n):
    ids = torch.randint(1, 96, (1, 64))
    return [{"input_ids": ids, "labels": ids}] * n


def test_few_sequences_within_the_default_budget_are_a_warning(monkeypatch):
    monkeypatch.setattr("peft_gradinit.calibration.spec.DEFAULT_MAX_TOKENS", 100)
    message = "read only 2 sequences before the default budget ended it.*max_batches or a larger"
    with pytest.warns(UserWarning, match=message):
        run_pass(pico_llama(), long_texts(3))
    with pytest.warns(UserWarning, match=message):
        run_pass(pico_llama(), iter(long_texts(3)))
    run_pass(pico_llama(), long_texts(2))  # they are all
    run_pass(pico_llama(), long_texts(3), max_tokens=100)  # as was asked for


def after(n_batches, n_each, *, rows=False, **options):
    budget = Budget(quiet((), **options))
    budget.n_batches, budget.n_sequences = n_batches, n_batches * n_each
    budget.n_tokens, budget.n_rows = n_batches * n_each, n_batches * n_each * rows
    return budget


@pytest.mark.parametrize(
    ("budget", "n_data", "total"),
    [
        (after(0, 0), None, 65_536),
        (after(2, 100), None, 65_536),
        (after(2, 100), 5, 500),
        (after(2, 100, max_batches=3), 5, 300),
        (after(2, 100, max_batches=3), None, 300),
        (after(0, 0, max_batches=3), None, None),
        (after(2, 100, max_tokens=150), 5, 200),
        (after(2, 4, rows=True), None, 128),
        (after(2, 4, rows=True), 3, 12),
        (after(2, 4, rows=True, max_tokens=9), None, 9),
    ],
)
def test_the_progress_bar_ends_at_what_will_be_read(budget, n_data, total):
    assert expected(budget, budget.n_tokens, n_data) == total


def test_the_budget_of_sequences_is_for_no_other_budget():
    assert Calibration([1]).sequence_budget == DEFAULT_MAX_SEQUENCES == 128
    assert Calibration([1], max_batches=2).sequence_budget is None
    assert Calibration([1], max_tokens=2).sequence_budget is None


@pytest.mark.parametrize(
    ("options", "n"), [({"max_tokens": 200}, 200), ({"max_batches": 40}, 160), ({}, 128)]
)
def test_what_a_pass_would_read_is_known_before(options, n):
    calibration = Calibration((), batch_size=4, **options)
    images = ({"pixel_values": torch.zeros(1, 3, 8, 8)} for _ in range(300))
    assert list(lengths_within(calibration, images)) == [1] * n


@pytest.mark.parametrize(
    ("options", "n"), [({"max_tokens": 11}, 3), ({"max_batches": 2}, 8), ({}, 300)]
)
def test_the_same_of_tokens(options, n):
    calibration = Calibration((), batch_size=4, **options)
    taken = iter({"input_ids": torch.ones(1, 5)} for _ in range(300))
    assert list(lengths_within(calibration, taken)) == [5] * n
    assert len(list(taken)) == 300 - n  # nothing is read that is not counted
