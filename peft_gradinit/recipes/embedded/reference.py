"""Prose of Python's language reference, which comes with Python, for continued pretraining."""

import hashlib
import pydoc_data.topics

import datasets

from ...errors import ConfigError

REFERENCE = "embedded:reference"
_LENGTH = 1200  # characters
_SPLITS = ("train", "validation", "test")


def reference(split: str) -> datasets.Dataset:
    """Passages of the language reference.

    A topic belongs to one split, by a hash of its name. Passages end at the end of a paragraph,
    where one is near 1,200 characters.

    Args:
        split: `"train"` (8 of 10 topics), `"validation"` or `"test"`.

    Returns:
        Rows with `text` and `topic`.

    Raises:
        ConfigError: for another split.
    """
    if split not in _SPLITS:
        raise ConfigError(f"{REFERENCE!r} has the splits {list(_SPLITS)}, got {split!r}.")
    rows = [
        {"text": passage, "topic": topic}
        for topic, text in sorted(pydoc_data.topics.topics.items(), key=lambda item: _hash(item[0]))
        if _split_of(topic) == split
        for passage in _passages(text)
    ]
    return datasets.Dataset.from_list(rows)


def _split_of(topic: str) -> str:
    return {0: "validation", 1: "test"}.get(int(_hash(topic), 16) % 10, "train")


def _passages(text: str) -> list[str]:
    passages, passage = [], ""
    for paragraph in text.strip().split("\n\n"):
        if passage and len(passage) + len(paragraph) > _LENGTH:
            passages.append(passage)
            passage = ""
        passage = f"{passage}\n\n{paragraph}" if passage else paragraph
    return [*passages, passage]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
