"""Which tokens count: padding, the shift of causal labels, classes, two-part models, odd shapes."""

import pytest
import torch
from transformers import (
    BatchEncoding,
    BertConfig,
    BertForMaskedLM,
    BertForMultipleChoice,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_gradinit.calibration.feed.selection import TokenSelection
from tests.helpers import pico_gpt2, pico_llama

MASK = torch.tensor([[1, 1, 1, 1, 0], [0, 1, 1, 1, 1]])  # padding on the right, on the left
IDS = torch.tensor([[5, 6, 7, 8, 0], [0, 5, 6, 7, 8]])
LABELS = torch.tensor([[-100, -100, 7, 8, -100], [-100, -100, -100, -100, 8]])
X = torch.arange(10.0).reshape(2, 5, 1)


def bert(cls=BertForMaskedLM):
    config = BertConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32,
    )  # fmt: skip
    return cls(config).eval()


def t5():
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return T5ForConditionalGeneration(config).eval()


def chosen(model, batch, x=X, use_labels=True):
    """Numbers of the tokens that are kept."""
    return TokenSelection(model, batch, use_labels=use_labels).rows(x).flatten().tolist()


@pytest.mark.parametrize("model", [pico_llama(), pico_gpt2()])
def test_causal_tokens_count_if_the_next_label_is_kept(model):
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}

    # Labels stand at 2, 3 and 9; the tokens that predict them are one before.
    assert chosen(model, batch) == [1, 2, 8]
    assert TokenSelection(model, batch, use_labels=True).n_tokens == 3


def test_labels_that_are_not_shifted_stand_at_their_tokens():
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    assert chosen(bert(), batch) == [2, 3, 9]


def test_a_kept_label_at_the_first_token_of_all_is_predicted_by_none():
    labels = torch.full_like(IDS, -100)
    labels[:, 0] = 5
    batch = {"input_ids": IDS, "labels": labels}
    assert TokenSelection(pico_llama(), batch, use_labels=True).n_tokens == 0


@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([0, 1]),
        torch.tensor([0.1, 0.2]),
        torch.tensor([[0.0] * 5] * 2),
        torch.tensor([[1, 0, 1], [0, 0, 1]]),
    ],
)
def test_classes_and_scores_select_no_tokens(labels):
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    assert chosen(bert(BertForSequenceClassification), batch) == [0, 1, 2, 3, 6, 7, 8, 9]


def test_labels_are_ignored_on_request():
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": LABELS}
    assert chosen(pico_llama(), batch, use_labels=False) == [0, 1, 2, 3, 6, 7, 8, 9]


def test_without_a_mask_all_tokens_count_and_nothing_is_copied():
    for batch in ({"input_ids": IDS}, (IDS,), IDS, {"inputs_embeds": torch.zeros(2, 5, 3)}):
        assert TokenSelection(pico_llama(), batch, use_labels=True).rows(X) is X


def test_batch_encodings_and_boolean_masks_are_understood():
    batch = BatchEncoding({"input_ids": IDS, "attention_mask": MASK.bool()})
    assert chosen(pico_llama(), batch) == [0, 1, 2, 3, 6, 7, 8, 9]


def test_flattened_inputs_are_selected_and_routed_ones_taken_whole():
    batch = {"input_ids": IDS, "attention_mask": MASK}
    model = pico_llama()

    assert chosen(model, batch, X.reshape(10, 1)) == [0, 1, 2, 3, 6, 7, 8, 9]
    for other in (X[0], X[:, :3], X.reshape(1, 10, 1), X.reshape(5, 2, 1), X[0, 0]):
        assert chosen(model, batch, other) == other.flatten().tolist()


def test_a_mask_of_four_dimensions_is_not_one_of_tokens():
    batch = {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 5, 5)}
    assert chosen(pico_llama(), batch) == list(range(10))


def test_each_part_of_a_two_part_model_has_its_own_tokens():
    labels = torch.tensor([[3, 4, -100], [3, -100, -100]])
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    decoder = torch.arange(6.0).reshape(2, 3, 1)

    assert chosen(t5(), batch) == [0, 1, 2, 3, 6, 7, 8, 9]
    assert chosen(t5(), batch, decoder) == [0, 1, 3]
    assert TokenSelection(t5(), batch, use_labels=True).n_tokens == 3


def test_two_parts_as_long_keep_what_either_keeps():
    labels = torch.tensor([[3, -100, -100, -100, 4], [3, -100, -100, -100, -100]])
    batch = {"input_ids": IDS, "attention_mask": MASK, "labels": labels}
    assert chosen(t5(), batch) == list(range(10))


def test_what_is_behind_the_last_label_of_a_decoder_is_padding():
    labels = torch.tensor([[5, -100, 7, -100, -100], [5, 6, 7, 8, 9]])
    batch = {"input_ids": IDS[:, :3], "labels": labels}
    assert chosen(t5(), batch, use_labels=False) == [0, 1, 2, 5, 6, 7, 8, 9]
    assert chosen(t5(), batch) == [0, 2, 5, 6, 7, 8, 9]
    masked = {**batch, "decoder_attention_mask": torch.ones_like(labels)}  # the mask knows better
    assert len(chosen(t5(), masked, use_labels=False)) == 10


def test_padding_of_several_choices_a_row_does_not_count():
    ids, mask = IDS.view(1, 2, 5), MASK.view(1, 2, 5)
    batch = {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([1])}
    assert chosen(bert(BertForMultipleChoice), batch) == [0, 1, 2, 3, 6, 7, 8, 9]
    del batch["attention_mask"]
    assert len(chosen(bert(BertForMultipleChoice), batch)) == 10
