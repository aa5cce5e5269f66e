"""Encoded rows, padded to a batch."""

from collections.abc import Callable
from typing import Any

from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    DefaultDataCollator,
    PreTrainedTokenizerBase,
)


def collator(processor: Any) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Choose what pads the rows of a model.

    Args:
        processor: the model's tokenizer or image processor.

    Returns:
        A function from rows to a batch; labels of tokens are padded with -100.
    """
    if not isinstance(processor, PreTrainedTokenizerBase):
        return DefaultDataCollator()
    tokens, classes = DataCollatorForSeq2Seq(processor), DataCollatorWithPadding(processor)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        of_tokens = isinstance(rows[0].get("labels"), list)
        return dict(tokens(rows) if of_tokens else classes(rows))

    return collate
