"""Prose of Python's language reference, which comes with Python, for continued pretraining."""

import pydoc_data.topics

import datasets

from .splits import check_split, hash_of, split_of

REFERENCE = "embedded:reference"
_LENGTH = 1200  # characters


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
    check_split(REFERENCE, split)
    rows = [
        {"text": passage, "topic": topic}
        for topic, text in sorted(
            pydoc_data.topics.topics.items(), key=lambda item: hash_of(item[0])
        )
        if split_of(topic) == split
        for passage in _passages(text)
    ]
    return datasets.Dataset.from_list(rows)


def _passages(text: str) -> list[str]:
    passages, passage = [], ""
    for paragraph in text.strip().split("\n\n"):
        if passage and len(passage) + len(paragraph) > _LENGTH:
            passages.append(passage)
            passage = ""
        passage = f"{passage}\n\n{paragraph}" if passage else paragraph
    return [*passages, passage]
