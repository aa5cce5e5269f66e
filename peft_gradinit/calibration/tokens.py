"""How much a batch counts: tokens read, and the weight of its loss."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

IGNORE_INDEX = -100
"""Label of tokens without loss, the default of `torch.nn.CrossEntropyLoss` and of Transformers."""


def n_sequences(batch: Any) -> int:
    """Leading dimension of the batch's first tensor; 1 if there is none."""
    for value in batch.values() if isinstance(batch, Mapping) else _items(batch):
        if isinstance(value, Tensor) and value.dim() > 0:
            return value.shape[0]
    return 1


def n_input_tokens(batch: Any) -> int:
    """Tokens that the model reads, padding not counted; sequences if the batch has no tokens."""
    if isinstance(batch, Mapping):
        for mask in ("attention_mask", "decoder_attention_mask"):
            if isinstance(batch.get(mask), Tensor) and batch[mask].dim() == 2:
                return int(batch[mask].sum())
        if isinstance(batch.get("input_ids"), Tensor):
            return batch["input_ids"].numel()
    return n_sequences(batch)


def loss_weight(model: nn.Module, batch: Any) -> int:
    """Number of terms that the batch's loss is the mean of.

    Labels that are not -100; for causal models without the first position, which has no
    prediction. Sequences where there are no labels, or where they are not classes.

    Args:
        model: tells by its `loss_type` whether labels are shifted.
        batch: as passed to the model.

    Returns:
        The weight; 0 if all labels are -100.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return n_sequences(batch)
    if labels.dim() > 1 and _shifts_labels(model):
        labels = labels[..., 1:]
    return int((labels != IGNORE_INDEX).sum())


def _shifts_labels(model: nn.Module) -> bool:
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        return False
    return getattr(model, "loss_type", None) in ("ForCausalLM", "ForConditionalGeneration")


def _items(batch: Any) -> list[Any]:
    return list(batch) if isinstance(batch, tuple | list) else [batch]
