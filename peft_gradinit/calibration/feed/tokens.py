"""How much a batch counts: tokens read, and the weight of its loss."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..copying import fields_of
from .separable import is_mean_over_sequences, model_inside

IGNORE_INDEX = -100
"""Label of tokens without loss, the default of `torch.nn.CrossEntropyLoss` and of Transformers."""

_SHIFTED_LOSSES = ("ForCausalLM", "ForConditionalGeneration", "CsmForConditionalGeneration")
_SHIFTED_CLASSES = (
    *("LMHeadModel", "DoubleHeadsModel", "ReformerModelWithLMHead"),
    "ImageGPTForCausalImageModeling",
)
"""Endings of Transformers classes, such as `GPT2LMHeadModel`, that shift but name no loss type."""
_UNSHIFTED_CLASSES = frozenset({
    *("BartForCausalLM", "MBartForCausalLM", "PLBartForCausalLM", "MvpForCausalLM"),
    *("PegasusForCausalLM", "BigBirdPegasusForCausalLM", "MarianForCausalLM"),
    *("BlenderbotForCausalLM", "BlenderbotSmallForCausalLM", "ProphetNetForCausalLM"),
    *("TrOCRForCausalLM", "WhisperForCausalLM", "CpmAntForCausalLM"),
    *("XLNetLMHeadModel", "XLMWithLMHeadModel", "FlaubertWithLMHeadModel"),
})
"""Classes of Transformers with such a name whose labels belong to the outputs at their own place."""


def n_sequences(batch: Any) -> int:
    """Leading dimension of the first tensor of the batch or of what is in it; 1 if there is none."""
    first = _first_tensor(batch)
    return 1 if first is None else first.shape[0]


def n_input_tokens(batch: Any) -> int:
    """Tokens that the model reads, padding not counted; sequences if the batch has no tokens."""
    return int(sequence_tokens(batch).sum())


def sequence_tokens(batch: Any) -> Tensor:
    """Tokens of each sequence, padding not counted; ones if the batch has no tokens.

    They are counted in a mask, in token ids or in embeddings, but not in a mask of audio. A tuple
    has tokens if its first tensor holds ids. Dicts within a dict (an anchor and its positive, say)
    are sides of the same rows, and their tokens add up.
    """
    if isinstance(batch, Mapping):
        masks_tokens = _is_text(batch) or not _is_signal(batch)
        for key in ("attention_mask", "decoder_attention_mask")[not masks_tokens :]:
            if isinstance(mask := batch.get(key), Tensor) and _is_of_tokens(mask, batch):
                return (mask != 0).flatten(1).sum(1)
        # Batches of TRL's online trainers hold prompts and completions side by side.
        sides = [batch.get(key) for key in ("prompt_mask", "completion_mask")]
        masks = [mask for mask in sides if isinstance(mask, Tensor) and mask.dim() == 2]
        if len(masks) == len(sides):
            return torch.stack([(mask != 0).sum(1) for mask in masks]).sum(0)
        for key in ("input_ids", "inputs_embeds"):
            if isinstance(tokens := batch.get(key), Tensor) and tokens.dim() >= 2:
                return _equally_long(tokens if key == "input_ids" else tokens[..., 0])
        n, inner = n_sequences(batch), [s for s in _sides(batch) if has_tokens(s)]
        if n and inner and all(n_sequences(side) % n == 0 for side in inner):  # of several a row
            return torch.stack([sequence_tokens(s).reshape(n, -1).sum(1) for s in inner]).sum(0)
    elif (tokens := _ids(batch)) is not None:
        return _equally_long(tokens)
    return torch.ones(n_sequences(batch), dtype=torch.long, device="cpu")


def _is_of_tokens(mask: Tensor, batch: Mapping[str, Any]) -> bool:
    """Whether a mask has an entry for each token; of multiple choices there are several texts a row."""
    ids = batch.get("input_ids")
    return mask.dim() == 2 or (
        mask.dim() == 3 and isinstance(ids, Tensor) and ids.shape == mask.shape
    )


def _equally_long(tokens: Tensor) -> Tensor:
    n = tokens.shape[1:].numel()
    return torch.full(tokens.shape[:1], n, dtype=torch.long, device="cpu")


def has_tokens(batch: Any) -> bool:
    """Whether the rows are of tokens: not audio clips, images, series, or what is not known."""
    if not isinstance(batch, Mapping):
        return _ids(batch) is not None
    if _is_text(batch) or _is_signal(batch):
        return _is_text(batch)
    masks = ("attention_mask", "decoder_attention_mask", "prompt_mask")
    masked = any(isinstance(batch.get(key), Tensor) for key in masks)
    return masked or any(has_tokens(side) for side in _sides(batch))


def _sides(batch: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [value for value in batch.values() if isinstance(value, Mapping)]


def _is_text(batch: Mapping[str, Any]) -> bool:
    return any(isinstance(batch.get(key), Tensor) for key in ("input_ids", "inputs_embeds"))


def _is_signal(batch: Mapping[str, Any]) -> bool:
    return any(key.startswith(("input_values", "input_features", "pixel_values")) for key in batch)


def _ids(batch: Any) -> Tensor | None:
    """The token ids of a batch that is no dict; `None` if its first tensor holds none."""
    first = _first_tensor(batch)
    return first if first is not None and first.dim() == 2 and first.dtype == torch.long else None


def loss_weight(model: nn.Module, batch: Any) -> int:
    """Number of terms that the batch's loss is the mean of.

    These are the labels that are not -100; for causal models (by `loss_type` or the class's name)
    without the first position, which has no prediction; in segmentation, those that the config does
    not ignore. Without labels, with labels that are not classes, or with CTC, these are the
    sequences; in question answering, those whose answer is within the input.
    """
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or labels.is_floating_point():
        return _n_answered(model, batch)
    if is_mean_over_sequences(model):
        return n_sequences(batch)
    if labels.dim() > 1 and shifts_labels(model):
        labels = labels[..., 1:]
    return int((labels != _ignored_label(model)).sum())


def _ignored_label(model: nn.Module) -> int:
    model = model_inside(model)
    if not type(model).__name__.endswith("ForSemanticSegmentation"):
        return IGNORE_INDEX
    names = ("semantic_loss_ignore_index", "loss_ignore_index")
    known = (getattr(model.config, name, None) for name in names)
    return next((index for index in known if index is not None), IGNORE_INDEX)


def _n_answered(model: nn.Module, batch: Any) -> int:
    """Sequences; of questions, those with an answer that was not cut off, which has no loss."""
    n = n_sequences(batch)
    starts = batch.get("start_positions") if isinstance(batch, Mapping) else None
    inputs = None if starts is None else batch.get("input_ids", batch.get("inputs_embeds"))
    if getattr(model_inside(model), "loss_type", None) != "ForQuestionAnswering" or inputs is None:
        return n
    return int((starts < inputs.shape[1]).sum())


def is_encoder_decoder(model: nn.Module) -> bool:
    """Whether the model, or its model of text, has two parts, each with tokens of its own."""
    config = getattr(model_inside(model), "config", None)
    configs = (config, getattr(config, "text_config", None))
    return any(getattr(one, "is_encoder_decoder", False) is True for one in configs)


def shifts_labels(model: nn.Module) -> bool:
    """Whether the label at `t + 1` belongs to the output at `t`."""
    model = model_inside(model)
    if is_encoder_decoder(model):
        return False
    loss_type, name = getattr(model, "loss_type", None), type(model).__name__
    if name in _UNSHIFTED_CLASSES:
        return False
    return loss_type in _SHIFTED_LOSSES or (loss_type is None and name.endswith(_SHIFTED_CLASSES))


def _first_tensor(batch: Any) -> Tensor | None:
    if isinstance(batch, Tensor):
        return batch if batch.dim() > 0 else None
    if isinstance(batch, Mapping):
        values = [batch.get("input_ids"), *batch.values()]
    elif (fields := fields_of(batch)) is not None:
        values = list(fields.values())
    else:
        values = list(batch) if isinstance(batch, tuple | list) else []
    return next((t for value in values if (t := _first_tensor(value)) is not None), None)
