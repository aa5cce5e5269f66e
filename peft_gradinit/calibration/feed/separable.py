"""Knows what may be cut: models whose loss is a mean over rows, and the rows of a batch.

A batch in pieces gives the same sums only if its loss is a mean over labels of rows that do not
meet in it. Losses that compare rows (in-batch negatives, routers' auxiliary losses) do not. A
dimension is the batch's by the name of the tensor, never by its size alone. What is not known here
is taken whole.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

_LOSS_TYPES = (
    *("ForCausalLM", "ForConditionalGeneration", "ForMaskedLM", "ForTokenClassification"),
    *("ForSequenceClassification", "ForImageClassification", "ForVideoClassification"),
    *("ForAudioClassification", "ForCTC"),
)
"""Losses of Transformers that are means over labels, or, with CTC, over rows."""

_CLASSES = (
    *("GPT2LMHeadModel", "OpenAIGPTLMHeadModel", "CTRLLMHeadModel", "BertLMHeadModel"),
    *("EncoderDecoderModel", "VisionEncoderDecoderModel", "SpeechEncoderDecoderModel"),
)
"""Classes of Transformers that name no loss type, and have such a loss."""

_SEVERAL_LOSSES = ("Dia", "Moshi", "Musicgen")
"""Beginnings of classes that add up the means of several codebooks."""

_LOSS_FUNCTIONS = (
    *("ForCausalLMLoss", "ForMaskedLMLoss", "ForSequenceClassificationLoss"),
    *("ForTokenClassification", "ForCTCLoss"),
)
_SOURCES = ("transformers", "liger_kernel")
_WRAPPERS = ("torch", "accelerate", "deepspeed", "peft", "peft_gradinit")
_INSIDE = ("_orig_mod", "module", "base_model", "model")
"""Attributes in which wrappers keep their model."""

_ROW_KEYS: Mapping[str, tuple[int, ...]] = {
    **dict.fromkeys(("input_ids", "token_type_ids", "decoder_input_ids"), (2,)),
    **dict.fromkeys(("inputs_embeds", "decoder_inputs_embeds", "bbox"), (3,)),
    **dict.fromkeys(("attention_mask", "decoder_attention_mask"), (2, 3, 4)),
    **dict.fromkeys(("position_ids", "decoder_position_ids"), (2,)),
    **dict.fromkeys(("labels", "label", "label_ids"), (1, 2, 3, 4)),
    **dict.fromkeys(("start_positions", "end_positions", "next_sentence_label"), (1, 2)),
    "pixel_values": (4, 5),
    "pixel_mask": (3,),
    "bool_masked_pos": (2,),
    "input_values": (2, 3, 4),
    "input_features": (3, 4),
}
"""Tensors whose leading dimension is the row, and the numbers of dimensions with which it is."""


def model_inside(model: Any) -> Any:
    """The model inside the wrappers of the known libraries; the model itself if it has none."""
    while _root(type(model).__module__) in _WRAPPERS and not _is_host(model):
        parts = getattr(model, "_modules", {})
        if (inside := next((parts[name] for name in _INSIDE if parts.get(name)), None)) is None:
            break
        model = inside
    return model


def is_mean_over_rows(model: Any) -> bool:
    """Whether the model's own loss is known to be a mean over labels of independent rows."""
    model = model_inside(model)
    forward = vars(model).get("forward", type(model).forward)
    if _root(getattr(forward, "__module__", "")) not in _SOURCES:
        return False
    own = vars(model).get("_loss_function")
    if own is not None and getattr(own, "__name__", "") not in _LOSS_FUNCTIONS:
        return False
    if type(model).__name__.startswith(_SEVERAL_LOSSES) or _has_router_loss(model):
        return False
    kind = _loss_type(model)
    return kind in _LOSS_TYPES or (kind is None and _plain_name(model) in _CLASSES)


def is_mean_over_sequences(model: Any) -> bool:
    """Whether the model's own loss counts each row once, however many labels it has."""
    return _loss_type(model_inside(model)) == "ForCTC"


def sums_sequences(model: Any) -> bool:
    """Whether the model's own loss is a sum over rows, not their mean."""
    config = getattr(model_inside(model), "config", None)
    return is_mean_over_sequences(model) and getattr(config, "ctc_loss_reduction", "") == "sum"


def is_sliceable(batch: Any) -> bool:
    """Whether every value of a dict batch is known to have the batch's rows as leading dimension.

    Batches of tokens and images are not: two images may belong to one sequence, also where there
    are as many images as sequences.
    """
    if not isinstance(batch, Mapping) or not batch:
        return False
    if "input_ids" in batch and any(key.startswith("pixel_values") for key in batch):
        return False
    if not all(isinstance(v, Tensor) and v.dim() in _ROW_KEYS.get(k, ()) for k, v in batch.items()):
        return False
    return len({v.shape[0] for v in batch.values()}) == 1


def sliced(batch: Mapping[str, Tensor], start: int, stop: int | None) -> dict[str, Tensor]:
    """Some of the sequences of a batch that `is_sliceable`."""
    return {key: value[start:stop] for key, value in batch.items()}


def _loss_type(model: Any) -> str | None:
    kind = getattr(model, "loss_type", None)
    # Early versions of Transformers 5 have no loss type for CTC.
    return "ForCTC" if kind is None and _plain_name(model).endswith("ForCTC") else kind


def _has_router_loss(model: Any) -> bool:
    config = getattr(model, "config", None)
    configs = [
        config,
        *(v for v in getattr(config, "__dict__", {}).values() if hasattr(v, "to_dict")),
    ]
    return any(getattr(c, "output_router_logits", False) for c in configs)


def _plain_name(model: Any) -> str:
    return type(model).__name__.removeprefix("FSDP")  # fully_shard makes a class of its own


def _is_host(model: Any) -> bool:
    """Whether it is a model of Transformers, whose class `fully_shard` may have replaced."""
    return any(kind.__name__ == "PreTrainedModel" for kind in type(model).__mro__)


def _root(module: str | None) -> str:
    return (module or "").partition(".")[0]
