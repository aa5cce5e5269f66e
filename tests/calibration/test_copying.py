"""Batches are kept as they came, whatever the user's iterator or loss does with them afterwards."""

import numpy as np
import pytest
import torch
from transformers import BatchEncoding

from peft_gradinit.calibration import Feed, Gradients
from peft_gradinit.calibration.copying import kept_sample, own_copy
from peft_gradinit.calibration.feed.shards import shares
from peft_gradinit.layouts import Processes
from tests.calibration.passes import FLOAT32, gradients, measure, run_pass, worst_error
from tests.helpers import pico_llama, quiet, token_batches


class Reusing:
    """Yields one dict of tensors, and writes every batch into it."""

    def __init__(self, batches):
        self.batches = batches

    def __iter__(self):
        buffers = {k: v.clone() for k, v in self.batches[0].items()}
        for batch in self.batches:
            for key, value in batch.items():
                buffers[key].copy_(value)
            yield buffers


def same_length():
    length = min(b["input_ids"].shape[1] for b in token_batches())
    return [{k: v[:, :length] for k, v in batch.items()} for batch in token_batches()]


def popping(model, batch):
    labels = batch.pop("labels")
    loss = model(**batch, labels=labels).loss
    labels.fill_(-100)
    return loss


def equal(kept, batches):
    assert len(kept) == len(batches)
    return all(torch.equal(a[k], b[k]) for a, b in zip(kept, batches, strict=True) for k in b)


@pytest.mark.parametrize("loss_fn", [None, popping])
def test_batches_of_reused_buffers_are_measured_and_weighted_as_they_came(loss_fn):
    model, batches = pico_llama(), same_length()
    want, facts = run_pass(model, batches)
    got, found = run_pass(model, Reusing(batches), loss_fn=loss_fn)
    assert worst_error(got, want) < FLOAT32
    assert found.loss_weight == facts.loss_weight
    assert gradients(model, Reusing(batches)).keys() == want.keys()


@pytest.mark.parametrize("loss_fn", [None, popping])
def test_batches_for_the_second_look_are_as_they_came(loss_fn):
    data, need = Reusing(same_length()), Gradients(keep_batches=True)
    result = measure(pico_llama(), data, need=need, loss_fn=loss_fn)
    whole = [{k: torch.cat([b[k] for b in result.replay.batches]) for k in same_length()[0]}]
    want = [{k: torch.cat([b[k] for b in same_length()]) for k in same_length()[0]}]
    assert equal(whole, want)
    assert "labels" in result.probe


def test_batches_that_wait_for_other_processes_are_as_they_came():
    batches = [{k: v[:1] for k, v in batch.items()} for batch in same_length()]
    found = [
        next(shares(iter(Feed(quiet(Reusing(batches)), pico_llama())), Processes(rank, 3)))
        for rank in range(3)
    ]
    assert equal([step.batch for step in found], batches)


def test_samples_of_reused_buffers_are_collated_as_they_came():
    model, rows = pico_llama(), torch.randint(1, 96, (4, 10))

    class Samples(torch.utils.data.IterableDataset):
        def __iter__(self):
            buffer = torch.empty(10, dtype=torch.long)
            for row in rows:
                yield {"input_ids": buffer.copy_(row), "labels": buffer}

    want = gradients(model, [{"input_ids": rows, "labels": rows}])
    assert worst_error(gradients(model, Samples()), want) < FLOAT32


def test_copies_share_nothing_with_their_batch_and_keep_its_form():
    batch = BatchEncoding({"ids": torch.ones(2), "more": [torch.ones(1), "text"]})
    copied = own_copy(batch)
    assert isinstance(copied, BatchEncoding)
    assert copied["more"] is not batch["more"]
    assert copied["more"][1] == "text"
    assert copied["ids"].data_ptr() != batch["ids"].data_ptr()
    assert own_copy(torch.ones(2, requires_grad=True)).is_leaf
    sample = {"ids": np.ones(2), "labels": [1], "text": "a"}
    kept = kept_sample(sample)
    sample["ids"][0], sample["labels"][0] = 5, 5
    assert (kept["ids"][0], kept["labels"], kept["text"]) == (1, [1], "a")
    assert kept_sample("a") == "a"
