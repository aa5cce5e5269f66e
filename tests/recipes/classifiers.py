"""Small classifiers with absolute positions, on disk with their tokenizers."""

from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForSequenceClassification,
)

WORDS = ("good", "bad", "a", "film", "it", "was")
SPECIAL = ("<pad>", "<unk>", "</s>")
SIZES = {
    "vocab_size": len(WORDS) + len(SPECIAL),
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
N_POSITIONS = 24


def save_classifier(folder, kind="bert", **options):
    """A model that has positions for 24 tokens; its tokenizer knows no limit."""
    spoken = tokenizer()
    if kind.startswith("gpt2"):
        spoken.pad_token = None
    spoken.save_pretrained(folder)
    model(kind, **options).save_pretrained(folder)
    return str(folder)


def model(kind, **options):
    if kind == "bert":
        config = BertConfig(**SIZES, max_position_embeddings=N_POSITIONS, **options)
        return BertForSequenceClassification(config)
    if kind == "roberta":  # a row for padding, and one before it
        config = RobertaConfig(
            **SIZES, max_position_embeddings=N_POSITIONS + 2, pad_token_id=1, **options
        )
        return RobertaForSequenceClassification(config)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "vocab_size": SIZES["vocab_size"]}
    config = GPT2Config(**sizes, n_positions=N_POSITIONS, eos_token_id=2, bos_token_id=2, **options)
    classes = {"gpt2": GPT2LMHeadModel, "gpt2-classifier": GPT2ForSequenceClassification}
    return classes[kind](config)


def tokenizer():
    words = {word: i for i, word in enumerate((*SPECIAL, *WORDS))}
    inner = Tokenizer(WordLevel(words, unk_token="<unk>"))
    inner.pre_tokenizer = Whitespace()
    names = {"pad_token": "<pad>", "unk_token": "<unk>", "eos_token": "</s>"}
    return PreTrainedTokenizerFast(tokenizer_object=inner, **names)
