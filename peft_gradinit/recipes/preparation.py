"""Texts and chats as TRL prepares them for a causal model: tokens, labels, packed sequences."""

import tempfile
from collections.abc import Mapping
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerBase
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ..errors import DataError
from .data_section import DataSection
from .rows import Rows


def prepare(
    rows: Rows,
    section: DataSection,
    tokenizer: PreTrainedTokenizerBase,
    options: Mapping[str, Any] | None = None,
) -> Rows:
    """Tokenise, mask and cut or pack rows as `SFTTrainer` does.

    Args:
        rows: with `text`, `messages`, `prompt` and `completion`, or `input_ids`.
        section: their length, and which of them carry loss.
        tokenizer: of the model.
        options: further fields of `SFTConfig`.

    Returns:
        `input_ids` and `labels`; packed ones have `seq_lengths` as well.
    """
    chosen = {
        **(options or {}),
        "assistant_only_loss": section.assistant_only_loss,
        "completion_only_loss": False if section.loss_on_prompt else None,
        "max_length": section.length,
        "packing": section.packing,
    }
    if not section.drop_longer:
        return _prepared(rows, tokenizer, chosen)
    longer = {**chosen, "max_length": section.length + 1, "packing": False}  # TRL cuts, never drops
    whole = _prepared(rows, tokenizer, longer).filter(_Fits(section.length))
    return _prepared(whole, tokenizer, chosen) if section.packing else whole


class _Fits:
    """Whether a row is no longer than a length."""

    def __init__(self, length: int) -> None:
        self.length = length

    def __call__(self, row: Mapping[str, Any]) -> bool:
        return len(row["input_ids"]) <= self.length


def _prepared(rows: Rows, tokenizer: PreTrainedTokenizerBase, options: Mapping[str, Any]) -> Rows:
    """The rows of a trainer with a stand-in for the model: TRL prepares them in its constructor.

    Args:
        rows: as for `prepare`.
        tokenizer: of the model.
        options: fields of `SFTConfig`.

    Returns:
        The prepared rows.

    Raises:
        DataError: if TRL refuses them.
    """
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            folder,
            max_steps=1,  # streams do not tell their length
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            use_cpu=not torch.accelerator.is_available(),
            **options,
        )
        try:
            trainer = SFTTrainer(
                _stand_in(), arguments, train_dataset=rows, processing_class=tokenizer
            )
        except (ValueError, TypeError, KeyError, RuntimeError) as error:
            raise DataError(f"TRL cannot prepare the rows for training: {error}") from error
    return trainer.train_dataset  # pyright: ignore[reportReturnType]


def _stand_in() -> LlamaForCausalLM:
    """As small as models are; split over devices as far as `Trainer` asks, so that it takes one."""
    config = LlamaConfig(
        vocab_size=8,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
    )
    model: Any = LlamaForCausalLM(config)
    model.is_parallelizable = model.model_parallel = True
    return model
