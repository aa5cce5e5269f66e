"""Texts are cut to what the model has positions for, and longer ones are not asked for."""

import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    BartConfig,
    BartForConditionalGeneration,
    DebertaV2Config,
    DebertaV2ForSequenceClassification,
    GPTJConfig,
    GPTJForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from peft_gradinit.errors import ConfigError
from peft_gradinit.recipes import DataSection, ModelSection, sequence_length
from peft_gradinit.recipes.lengths import table_length
from tests.helpers import pico_llama
from tests.recipes.classifiers import N_POSITIONS, model, save_classifier, tokenizer


def length(folder, processor=None, **options):
    data = DataSection(path="x", **options)
    return sequence_length(data, ModelSection(name=str(folder)), processor)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_the_length_is_the_models_own(kind, tmp_path):
    folder = save_classifier(tmp_path, kind)
    assert tokenizer().model_max_length > 1e20
    assert length(folder, tokenizer()) == N_POSITIONS
    assert length(folder, max_length=N_POSITIONS) == N_POSITIONS
    assert length(folder, max_length=8) == 8
    with pytest.raises(
        ConfigError,
        match=rf"max_length=25, but '.*' has positions for {N_POSITIONS} tokens; give 24",
    ):
        length(folder, max_length=25)
    loaded = AutoModelForSequenceClassification.from_pretrained(folder)
    ids = torch.full((1, N_POSITIONS), 4)
    assert loaded(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.isfinite().all()


def test_a_tokenizer_may_know_a_smaller_limit(tmp_path):
    folder, smaller = save_classifier(tmp_path), tokenizer()
    smaller.model_max_length = 16
    assert length(folder, smaller) == 16
    assert length(folder, smaller, max_length=20) == 20


def test_rotary_models_run_on_but_say_so(tmp_path):
    pico_llama().save_pretrained(tmp_path)
    named = pico_llama().config.max_position_embeddings
    assert length(tmp_path) == min(1024, named)
    with pytest.warns(UserWarning, match=rf"max_length={named + 1} is more than the {named} pos"):
        assert length(tmp_path, max_length=named + 1) == named + 1


SMALL = {"vocab_size": 32, "d_model": 16}


@pytest.mark.parametrize(
    ("make", "want"),
    [
        (lambda: model("gpt2"), N_POSITIONS),
        (
            lambda: BartForConditionalGeneration(
                BartConfig(**SMALL, max_position_embeddings=20, encoder_layers=1, decoder_layers=1)
            ),
            20,
        ),
        (lambda: T5ForConditionalGeneration(T5Config(**SMALL, num_layers=1)), None),
        (
            lambda: DebertaV2ForSequenceClassification(
                DebertaV2Config(vocab_size=32, num_hidden_layers=1, position_biased_input=False)
            ),
            None,
        ),
        (
            lambda: GPTJForCausalLM(
                GPTJConfig(
                    vocab_size=32, n_positions=20, n_embd=16, n_layer=1, n_head=2, rotary_dim=4
                )
            ),
            20,
        ),
    ],
    ids=["gpt2", "bart", "t5", "deberta", "gptj"],
)
def test_tables_of_positions_are_found(make, want):
    with torch.device("meta"):
        assert table_length(make()) == want
