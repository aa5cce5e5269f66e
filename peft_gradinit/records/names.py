"""Names of the files that this package writes beside an adapter of PEFT, and of what loads its base model."""

from collections.abc import Mapping, Sequence
from typing import Any

PROVENANCE_FILE = "gradinit.json"
"""The facts that `adapter_config.json` has no place for."""

PICTURE = "gradinit.png"
"""Where the ranks went, on the card."""

CARD = "README.md"
"""PEFT and `Trainer` write it as well; a section of it is ours."""

_AUTO_CLASSES = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
    "FEATURE_EXTRACTION": "AutoModel",
}

_LAST_OF_HEADS = (
    ".classifier.weight",
    ".classifier.1.weight",
    ".classifier.out_proj.weight",
    ".classification_head.out_proj.weight",
    ".score.weight",
)
"""Last layers of heads of classifiers; DistilBERT's `pre_classifier` is none."""


def base_class(config: Mapping[str, Any]) -> str | None:
    """The class of Transformers that loads the base model of an adapter.

    PEFT notes the class of the model in `auto_mapping` if the adapter has no `task_type`.

    Args:
        config: what `adapter_config.json` holds.

    Returns:
        Its name, or nothing if the adapter does not tell.
    """
    if (known := _AUTO_CLASSES.get(config.get("task_type") or "")) is not None:
        return known
    mapping = config.get("auto_mapping") or {}
    is_known = str(mapping.get("parent_library")).split(".")[0] == "transformers"
    return mapping.get("base_model_class") if is_known else None


def label_count(shapes: Mapping[str, Sequence[int]]) -> int | None:
    """Number of classes of the head that was trained with an adapter.

    Args:
        shapes: of what was trained in full, by name.

    Returns:
        The outputs of the head's last layer, or nothing if no head has a name that is known.
    """
    sizes = {
        shape[0]
        for name, shape in shapes.items()
        if len(shape) > 1 and f".{name}".endswith(_LAST_OF_HEADS)
    }
    return sizes.pop() if len(sizes) == 1 else None


def padding_token(model: Any) -> int | None:
    """The padding token of a classifier of sequences; decoders classify the last token that is another.

    Args:
        model: of Transformers or of PEFT; others have none.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not type(base).__name__.endswith("ForSequenceClassification"):
        return None
    config: Any = getattr(base, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "pad_token_id", None)


def give_padding_token(model: Any, token: int) -> None:
    """Set the padding token of a classifier of sequences where Transformers reads it.

    Args:
        model: of Transformers; its config, and the part of it that is about text, get the token.
        token: its number.
    """
    for config in (model.config, model.config.get_text_config()):
        config.pad_token_id = token


def class_names(model: Any) -> list[str] | None:
    """Names of a classifier's outputs, in their order; none if its config numbers them only.

    Args:
        model: of Transformers; others have no names.
    """
    named = getattr(getattr(model, "config", None), "id2label", None) or {}
    names = [str(named[i]) for i in sorted(named)]
    is_classifier = type(model).__name__.endswith("Classification")
    return names if is_classifier and names != [f"LABEL_{i}" for i in range(len(names))] else None
