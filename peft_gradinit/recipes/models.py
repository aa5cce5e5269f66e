"""Models, tokenizers and image processors by name: from the Hub, a folder, or embedded."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from torch import nn
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaForCausalLM,
)

from ..errors import ConfigError
from . import embedded
from .labels import Labels
from .schema import ModelSection, told_task
from .sections import CLASSIFIED, Task, nearest

_AUTO_CLASSES: dict[str, Any] = {
    "CAUSAL_LM": AutoModelForCausalLM,
    "PREFERENCE": AutoModelForCausalLM,
    "SEQ_2_SEQ_LM": AutoModelForSeq2SeqLM,
    "SEQ_CLS": AutoModelForSequenceClassification,
    "IMAGE_CLS": AutoModelForImageClassification,
}
_ENDINGS: dict[str, Task] = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForImageClassification": "IMAGE_CLS",
}
_UNTRAINED: "WeakKeyDictionary[nn.Module, list[str]]" = WeakKeyDictionary()
_FAILURES = (OSError, ValueError, KeyError, ImportError, RuntimeError)


def task_of(section: ModelSection) -> Task:
    """What the model is for.

    Args:
        section: which model; its own `task` wins.

    Returns:
        The task.

    Raises:
        ConfigError: if the model's class does not tell.
    """
    if (told := told_task(section)) is not None:
        return told
    config = model_config(section)
    architectures = config.architectures or []
    for architecture in architectures:
        for ending, task in _ENDINGS.items():
            if architecture.endswith(ending):
                return task
        if architecture.endswith("ForConditionalGeneration") and config.is_encoder_decoder:
            return "SEQ_2_SEQ_LM"
    raise ConfigError(
        f"the class of the model {section.name!r} ({architectures}) does not tell its task; give "
        f"one of {sorted(_AUTO_CLASSES)}."
    )


def model_config(section: ModelSection) -> Any:
    """The model's configuration.

    Args:
        section: which model.

    Returns:
        A `PretrainedConfig`.

    Raises:
        ConfigError: if there is none.
    """
    if section.name == embedded.PICO_LLAMA:
        return embedded.pico_llama_config()
    try:
        return AutoConfig.from_pretrained(location(section.name), revision=section.revision)
    except _FAILURES as error:
        raise ConfigError(_unloadable("model", section.name, error)) from error


def load_model(
    section: ModelSection, labels: Labels | None = None, auto_class: Any = None
) -> nn.Module:
    """Load a model on the CPU (quantised ones: where bitsandbytes puts them).

    Args:
        section: which model, and how.
        labels: what the head of a classifier is to give.
        auto_class: of Transformers, which loads it. Default: that of the section's task.

    Returns:
        The model, in eval mode.

    Raises:
        ConfigError: if it cannot be loaded.
    """
    task = None if auto_class else task_of(section)
    may_classify = task is None or task in CLASSIFIED
    torch.manual_seed(section.seed)
    dtype = section.dtype if section.dtype == "auto" else getattr(torch, section.dtype)
    if section.name == embedded.PICO_LLAMA:
        model = LlamaForCausalLM(embedded.pico_llama_config()).eval()
        return model if dtype == "auto" else nn.Module.to(model, dtype)
    options: dict[str, Any] = {"revision": section.revision, "dtype": dtype}
    head = _head(section, labels) if may_classify else {}
    # A head for other classes is replaced by one that is drawn from the seed.
    options |= {**head, "ignore_mismatched_sizes": True} if head else {}
    if section.quantization is not None:
        options["quantization_config"] = _quantization(section, dtype)
    try:
        model, info = (_AUTO_CLASSES[task] if task else auto_class).from_pretrained(
            location(section.name), output_loading_info=True, **options
        )
    except _FAILURES as error:
        raise ConfigError(_unloadable("model", section.name, error)) from error
    if may_classify:
        new = [*info["missing_keys"], *info["mismatched_keys"]]
        _UNTRAINED[model] = _modules_of(model, [*new, *_outputs_of_others(section, labels)])
    return model


def untrained_modules(model: nn.Module) -> list[str]:
    """The modules of a classifier that nothing has taught its classes yet, such as a new head.

    Those that the checkpoint lacks are random. A head with as many outputs, whose config does not give
    the same names to them, keeps its weights. An adapter has to train and to save both.

    Args:
        model: from `load_model`.

    Returns:
        Names of modules without parts.
    """
    return _UNTRAINED.get(model, [])


def _modules_of(model: nn.Module, keys: list[Any]) -> list[str]:
    """Modules that hold parameters by themselves; keys with another shape come with both shapes."""
    names = {(key if isinstance(key, str) else key[0]).rpartition(".")[0] for key in keys}
    return [n for n, m in model.named_modules() if n in names and not list(m.children())]


def _outputs_of_others(section: ModelSection, labels: Labels | None) -> list[str]:
    """Parameters of a checkpoint's head, if its config does not name the classes that are asked for."""
    if labels is None:
        return []
    head = labels.head()
    if _names(head["id2label"]) == _names(model_config(section).id2label):
        return []
    less, more = (
        dict(_on_meta(section, {"num_labels": n}).named_parameters())
        for n in (head["num_labels"], head["num_labels"] + 1)
    )
    return [name for name in less if less[name].shape != more[name].shape]


def _names(id2label: Mapping[int, str]) -> list[str]:
    """Of the outputs, in their order; upper case says nothing."""
    return [str(id2label[i]).casefold() for i in sorted(id2label)]


def empty_model(section: ModelSection, labels: Labels | None = None) -> nn.Module:
    """The model on the meta device: shapes without weights.

    Args:
        section: which model.
        labels: as for `load_model`.

    Returns:
        The model.
    """
    return _on_meta(section, _head(section, labels) if task_of(section) in CLASSIFIED else {})


def _on_meta(section: ModelSection, head: dict[str, Any]) -> nn.Module:
    config = model_config(section)
    for name, value in head.items():
        setattr(config, name, value)
    dtype = torch.float32 if section.dtype == "auto" else getattr(torch, section.dtype)
    if section.dtype == "auto" and isinstance(config.dtype, torch.dtype):
        dtype = config.dtype
    with torch.device("meta"):
        return _AUTO_CLASSES[task_of(section)].from_config(config).to(dtype)


def load_processor(section: ModelSection) -> Any:
    """The tokenizer of a text model, the image processor of a vision model.

    Args:
        section: which model.

    Returns:
        A tokenizer with a padding token, or an image processor.

    Raises:
        ConfigError: if there is none, or a tokenizer that knows no words.
    """
    if section.name == embedded.PICO_LLAMA and section.tokenizer is None:
        return embedded.pico_tokenizer()
    name = section.tokenizer or section.name
    auto = AutoImageProcessor if task_of(section) == "IMAGE_CLS" else AutoTokenizer
    revision = section.revision if name == section.name else None
    try:
        processor = auto.from_pretrained(location(name), revision=revision)
    except _FAILURES as error:
        raise ConfigError(_unloadable("tokenizer or image processor of", name, error)) from error
    if auto is AutoTokenizer:
        _check_vocabulary(name, processor)
        if processor.pad_token is None:
            known = model_config(section).get_text_config().pad_token_id
            has = isinstance(known, int) and 0 <= known < len(processor)
            token = processor.convert_ids_to_tokens(known) if has else processor.eos_token
            processor.pad_token = token
    return processor


def _check_vocabulary(name: str, tokenizer: Any) -> None:
    """Refuse the empty tokenizer that some versions of Transformers make where there are no files.

    Args:
        name: of the model or the tokenizer, for the error.
        tokenizer: what was loaded.

    Raises:
        ConfigError: if it has special tokens only.
    """
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        reason = f"{type(tokenizer).__name__} knows special tokens only."
        raise ConfigError(_unloadable("tokenizer or image processor of", name, ValueError(reason)))


def check_ids(section: ModelSection, tokenizer: Any) -> None:
    """Refuse the tokenizer of another model if it has more tokens than the embedding has rows.

    That of the model itself may have some that no text has, such as one for images.

    Args:
        section: which model, and which tokenizer.
        tokenizer: what was loaded.

    Raises:
        ConfigError: naming both numbers.
    """
    if section.tokenizer in (None, section.name):
        return
    embedding: Any = getattr(empty_model(section), "get_input_embeddings", lambda: None)()
    rows = getattr(embedding, "num_embeddings", None)
    if rows is not None and len(tokenizer) > rows:
        raise ConfigError(
            f"model.tokenizer={section.tokenizer!r} has {len(tokenizer)} tokens, but the embedding of "
            f"{section.name!r} has {rows} rows; give a tokenizer of this model, or resize its embedding "
            "and save it first."
        )


def _head(section: ModelSection, labels: Labels | None) -> dict[str, Any]:
    if labels is not None:
        return labels.head()
    return {} if section.n_labels is None else {"num_labels": section.n_labels}


def _quantization(section: ModelSection, dtype: Any) -> BitsAndBytesConfig:
    compute = torch.bfloat16 if dtype == "auto" else dtype
    if section.quantization == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=compute
    )


def location(name: str) -> str:
    """What Transformers loads a model or tokenizer from: an embedded one has a folder.

    Args:
        name: Hub name, folder or embedded model.

    Returns:
        Hub name or folder.

    Raises:
        ConfigError: if there is no such embedded model.
    """
    if name == embedded.MINILM:
        return str(embedded.minilm_folder())
    if name == embedded.SMOLLM2:
        return str(embedded.smollm2_folder())
    if name.startswith(embedded.PREFIX):
        known = list(embedded.MODELS)
        raise ConfigError(f"there is no model {name!r}{nearest(name, known)}; known: {known}.")
    return name


def _unloadable(what: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    if _is_missing_folder(name):
        reason = "there is no such folder."
    network = " The network is switched off (HF_HUB_OFFLINE)." if HF_HUB_OFFLINE else ""
    return (
        f"cannot load the {what} {name!r}: {reason} Give a folder with config.json and weights, or "
        f"a name on the Hub.{network}"
    )


def _is_missing_folder(name: str) -> bool:
    looks_like_one = name.startswith((".", "/", "~")) or name.count("/") > 1
    return looks_like_one and not Path(name).exists()
