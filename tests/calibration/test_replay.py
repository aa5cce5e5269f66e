"""Batches kept for a second look: within a limit, weighted as in the pass."""

import dataclasses

import pytest
import torch

from peft_gradinit.calibration import base_loss, mean_loss
from peft_gradinit.calibration import replay as module
from peft_gradinit.calibration.replay import Replay
from tests.helpers import pico_llama, quiet, token_batches


def filled(model, batches):
    kept, total, weight = Replay(), 0.0, 0
    for batch in batches:
        n = int((batch["labels"][:, 1:] != -100).sum())
        with torch.no_grad():
            loss = model(**batch).loss.item()
        kept.keep(batch, loss, n)
        total, weight = total + loss * n, weight + n
    return kept, total / weight


def test_the_same_model_has_the_same_loss_again_and_another_its_own():
    model, batches = pico_llama(), token_batches()
    kept, want = filled(model, batches)
    assert base_loss(torch.nn.Linear(1, 1), kept) == pytest.approx(want, rel=1e-12)
    assert mean_loss(model, kept, quiet(batches)) == pytest.approx(want, rel=1e-6)
    other = pico_llama(seed=1)
    assert mean_loss(other, kept, quiet(batches)) == pytest.approx(filled(other, batches)[1])


def test_dropout_is_off_and_the_mode_is_given_back():
    model, batches = pico_llama(attention_dropout=0.5), token_batches()
    kept, want = filled(model, batches)
    model.train()
    assert mean_loss(model, kept, quiet(batches)) == pytest.approx(want, rel=1e-6)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_the_users_loss_and_its_weight_are_used():
    model, batches = pico_llama(), token_batches()
    kept = Replay()
    for i, batch in enumerate(batches, 1):
        kept.keep(batch, 7.0, i)
    calibration = quiet(
        batches,
        loss_fn=lambda m, b: (
            torch.tensor(3.0),
            1 + [torch.equal(b["input_ids"], x["input_ids"]) for x in batches].index(True),
        ),
    )
    assert base_loss(torch.nn.Linear(1, 1), kept) == 7
    assert mean_loss(model, kept, calibration) == 3


@dataclasses.dataclass
class OfOnesOwn:
    x: torch.Tensor


class Opaque:
    """Something with tensors that nobody sees."""

    def to(self, device):
        return self


@pytest.mark.parametrize(("kind", "n_kept"), [(OfOnesOwn, 2), (lambda x: (x, {"x": x}), 1)])
def test_tensors_in_containers_count_to_the_limit(kind, n_kept, monkeypatch):
    monkeypatch.setattr(module, "MAX_BYTES", 90)
    kept = Replay()
    for _ in range(5):
        kept.keep(kind(torch.ones(10)), 2.0, 3)
    assert len(kept.batches) == n_kept


def test_of_objects_whose_tensors_cannot_be_seen_one_is_kept():
    kept = Replay()
    for _ in range(5):
        kept.keep(Opaque(), 2.0, 3)
    assert len(kept.batches) == 1


def test_batches_beyond_the_limit_are_not_kept_but_the_first_always_is(monkeypatch):
    batches = token_batches()
    size = sum(t.numel() * t.element_size() for t in batches[0].values())
    monkeypatch.setattr(module, "MAX_BYTES", size - 1)
    kept = Replay()
    for batch in batches:
        kept.keep(batch, 2.0, 3)
    assert len(kept.batches) == 1
    assert (kept.n_bytes, kept.weights, base_loss(torch.nn.Linear(1, 1), kept)) == (size, [3], 2)
    assert "input_ids" not in repr(kept)
