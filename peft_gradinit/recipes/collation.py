"""Encoded rows, padded to a batch."""

from collections.abc import Callable
from typing import Any

from transformers import (
    DataCollatorForSeq2Seq,
    DataCollatorWithPadding,
    DefaultDataCollator,
    PreTrainedTokenizerBase,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling


def collator(processor: Any, model: Any = None) -> Callable[[list[dict[str, Any]]], dict[str, Any]]:
    """Choose what pads the rows of a model.

    Args:
        processor: the model's tokenizer or image processor.
        model: makes the decoder's inputs from the labels, of which smoothing leaves it none.

    Returns:
        A function from rows to a batch; labels of tokens are padded with -100.
    """
    if not isinstance(processor, PreTrainedTokenizerBase):
        return DefaultDataCollator()
    classes, pairs = DataCollatorWithPadding(processor), DataCollatorForSeq2Seq(processor, model)
    pad: Any = processor.pad_token_id
    causal = DataCollatorForLanguageModeling(pad)
    packed = DataCollatorForLanguageModeling(pad, padding_free=True)

    def collate(rows: list[dict[str, Any]]) -> dict[str, Any]:
        row = rows[0]
        if not isinstance(row.get("labels"), list):
            return dict(classes(rows))
        if "attention_mask" in row:
            return dict(pairs(rows))
        return dict(packed(rows) if "seq_lengths" in row else causal(rows))

    return collate
