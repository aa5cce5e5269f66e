"""A batch counts by its tokens, and its loss by the terms that it is the mean of."""

import dataclasses

import pytest
import torch
from torch.nn import functional as F
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertLMHeadModel,
    InstructBlipConfig,
    InstructBlipForConditionalGeneration,
    ReformerConfig,
    ReformerModelWithLMHead,
    SegformerConfig,
    SegformerForSemanticSegmentation,
    T5Config,
    T5ForConditionalGeneration,
    TrOCRConfig,
    TrOCRForCausalLM,
    XLMConfig,
    XLMWithLMHeadModel,
)

from peft_gradinit.calibration.feed.tokens import (
    has_tokens,
    loss_weight,
    n_input_tokens,
    n_sequences,
    shifts_labels,
)
from tests.helpers import pico_gpt2, pico_llama, token_batches


def bert(kind, **options):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "vocab_size": 96, "num_hidden_layers": 1}
    return kind(BertConfig(**sizes, num_attention_heads=2, **options)).eval()


def t5():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1}
    config = T5Config(**sizes, num_heads=2, pad_token_id=0, decoder_start_token_id=0)
    return T5ForConditionalGeneration(config).eval()


def bart(kind, config):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 16, "decoder_layers": 1, "decoder_attention_heads": 2}
    return kind(config(**sizes, decoder_ffn_dim=16, pad_token_id=0)).eval()


def reformer():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 16, "feed_forward_size": 16, "attention_head_size": 8}
    sizes |= {"num_attention_heads": 2, "attn_layers": ["local"], "axial_pos_embds": False}
    config = ReformerConfig(**sizes, max_position_embeddings=64, is_decoder=True)
    return ReformerModelWithLMHead(config).eval()


def xlm():
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "emb_dim": 16, "n_layers": 1, "n_heads": 2}
    return XLMWithLMHeadModel(XLMConfig(**sizes, pad_index=0)).eval()


def test_a_model_of_text_with_two_parts_does_not_shift():
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes["num_attention_heads"] = 2
    config = InstructBlipConfig(
        vision_config={**sizes, "image_size": 16, "patch_size": 8},
        qformer_config={**sizes, "vocab_size": 96},
        text_config=t5().config.to_dict(),
    )
    assert not shifts_labels(InstructBlipForConditionalGeneration(config))


TOKEN_MODELS = {
    "causal": pico_llama,
    "gpt2, which names no loss": pico_gpt2,
    "causal bert, which names no loss": lambda: bert(BertLMHeadModel, is_decoder=True),
    "masked": lambda: bert(BertForMaskedLM),
    "token classes": lambda: bert(BertForTokenClassification, num_labels=96),
    "bart alone, which does not shift": lambda: bart(BartForCausalLM, BartConfig),
    "reformer, which shifts": lambda: reformer(),
    "trocr, which does not shift": lambda: bart(TrOCRForCausalLM, TrOCRConfig),
    "xlm, which does not shift": lambda: xlm(),
    "compiled": lambda: torch.compile(pico_llama(), backend="aot_eager"),
    "seq2seq": t5,
}


@pytest.mark.parametrize("name", TOKEN_MODELS)
def test_weighted_losses_of_single_sequences_add_up_to_the_batch(name):
    # True if and only if the weight is what the model's own loss divides by.
    model, (batch,) = TOKEN_MODELS[name](), token_batches(4, 4)
    batch["labels"][0, :6] = -100
    with torch.no_grad(), torch.compiler.set_stance("force_eager"):
        rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(4)]
        total = sum(loss_weight(model, r) * model(**r).loss for r in rows)
        whole = loss_weight(model, batch) * model(**batch).loss
    # Padding is masked, but adds zeros to float32 sums.
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=0)


def segformer(ignored=255):
    torch.manual_seed(0)
    sizes = {"depths": [1] * 4, "hidden_sizes": [8] * 4, "decoder_hidden_size": 8}
    heads = {"num_attention_heads": [1] * 4, "semantic_loss_ignore_index": ignored}
    return SegformerForSemanticSegmentation(SegformerConfig(**sizes, **heads, num_labels=3)).eval()


@pytest.mark.parametrize("ignored", [255, 0])
def test_pixels_that_the_config_ignores_carry_no_loss(ignored):
    model = segformer(ignored)
    model.decode_head.batch_norm.eval()
    batch = {"pixel_values": torch.rand(2, 3, 64, 64), "labels": torch.randint(1, 3, (2, 64, 64))}
    batch["labels"][0, :40] = ignored
    with torch.no_grad():
        rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)]
        total = sum(loss_weight(model, r) * model(**r).loss for r in rows)
        whole = loss_weight(model, batch) * model(**batch).loss
    assert loss_weight(model, batch) == 64 * 64 + 24 * 64
    torch.testing.assert_close(total, whole, rtol=1e-5, atol=0)


def test_answers_that_were_cut_off_carry_no_loss():
    model = bert(BertForQuestionAnswering)
    batch = {
        "input_ids": torch.randint(3, 96, (4, 8)),
        "start_positions": torch.tensor([0, 2, 9, 8]),
    }
    batch["end_positions"] = torch.tensor([0, 5, 9, 8])
    assert loss_weight(model, batch) == 2
    with torch.no_grad():
        rows = [{k: v[i : i + 1] for k, v in batch.items()} for i in range(2)]
        total = sum(loss_weight(model, r) * model(**r).loss for r in rows)
        torch.testing.assert_close(total, 2 * model(**batch).loss, rtol=1e-5, atol=0)


def test_sequences_count_where_labels_are_not_tokens():
    batch = {"input_ids": torch.ones(4, 5, dtype=torch.long)}
    assert loss_weight(bert(BertForSequenceClassification), batch) == 4
    regression = {**batch, "labels": torch.rand(4)}
    multi_label = {**batch, "labels": torch.rand(4, 3)}
    classes = {**batch, "labels": torch.tensor([0, 1, -100, 2])}
    model = bert(BertForSequenceClassification)
    assert [loss_weight(model, b) for b in (regression, multi_label, classes)] == [4, 4, 3]
    assert loss_weight(model, (torch.ones(4, 5), torch.ones(4))) == 4


def test_weight_is_zero_if_no_token_carries_loss():
    (batch,) = token_batches(4, 4)
    batch["labels"][:, 1:] = -100  # the first one is shifted away
    assert loss_weight(pico_llama(), batch) == 0
    logits = pico_llama()(batch["input_ids"]).logits[:, :-1].flatten(0, 1)
    assert F.cross_entropy(logits, batch["labels"][:, 1:].flatten()).isnan()


@dataclasses.dataclass
class Sides:
    """A batch of one's own."""

    ids: torch.Tensor
    scores: torch.Tensor


MASK = torch.tensor([[1, 1, 0], [1, 0, 0]])
IDS = torch.ones(2, 3, dtype=torch.long)


@pytest.mark.parametrize(
    ("batch", "tokens"),
    [
        ({"input_ids": IDS, "attention_mask": MASK}, 3),
        ({"input_features": torch.ones(2, 9, 4), "decoder_attention_mask": MASK}, 3),
        ({"input_ids": IDS, "attention_mask": MASK[:, None, None]}, 6),
        ({"input_ids": IDS}, 6),
        ({"input_ids": IDS[:, None], "attention_mask": MASK[:, None]}, 3),  # one choice a row
        ({"input_ids": torch.ones(2, 2, 3).long()}, 12),  # two choices
        ({"inputs_embeds": torch.ones(2, 2, 3, 8)}, 12),
        (Sides(IDS, torch.ones(2)), 6),
        (((IDS, MASK), (torch.ones(2),)), 6),
        ({"inputs_embeds": torch.ones(2, 3, 8)}, 6),
        ({"return_loss": True, "pixel_values": torch.ones(2, 3, 8, 8)}, 2),
        ((IDS, MASK), 6),
        (IDS, 6),
        (torch.ones(2, 3), 2),
        ({"scalar": torch.tensor(1.0), "label": torch.ones(2)}, 2),
        ({"anchor": {"input_ids": IDS, "attention_mask": MASK}, "positive": {"input_ids": IDS}}, 9),
        ({"texts": ["a", "b"], "pair": {"left": {"input_ids": IDS}, "score": torch.ones(2)}}, 6),
        ({"clip": {"input_features": torch.ones(2, 9, 4)}}, 2),
        ({"text": {"input_ids": IDS}, "negatives": {"input_ids": torch.ones(8, 3).long()}}, 30),
    ],
)
def test_input_tokens_leave_out_padding(batch, tokens):
    assert n_input_tokens(batch) == tokens
    assert n_sequences(batch) == 2


def test_rows_of_dicts_within_dicts_are_of_tokens_if_one_is():
    assert has_tokens({"anchor": {"input_ids": IDS}, "scores": torch.ones(2)})
    assert not has_tokens({"clip": {"input_features": torch.ones(2, 9, 4)}})


def test_a_batch_without_tensors_counts_as_one():
    assert n_sequences("a text") == n_input_tokens({"text": "a"}) == 1
