"""Weights of a base model, by the names that an adapter has for its layers."""

from collections.abc import Callable, Mapping
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import AutoProcessor
from transformers.utils import IMAGE_PROCESSOR_NAME, PROCESSOR_NAME
from transformers.utils.hub import has_file

from peft_gradinit.errors import AdapterError, FingerprintError, warn
from peft_gradinit.recipes import ModelSection, load_model, location, model_config, section_of
from peft_gradinit.records import SavedAdapter, base_class, give_padding_token, label_count
from peft_gradinit.starts import base_name, linear_shape, linear_weight
from peft_gradinit.tuners import check_base

_PROCESSORS = ("tokenizer_config.json", PROCESSOR_NAME, IMAGE_PROCESSOR_NAME)


def model_section(name: str, adapter: SavedAdapter) -> ModelSection:
    """The base model of an adapter, with a head of the size that the adapter holds.

    Args:
        name: Hub name or folder.
        adapter: tells the classes of a head that it has trained, and, if the model is the one that it
            names, the revision.

    Returns:
        The section.
    """
    named = adapter.config.base_model_name_or_path == name
    return section_of(
        ModelSection,
        name=name,
        revision=adapter.config.revision if named else None,
        n_labels=label_count({name: t.shape for name, t in adapter.others.items()}),
    )


def class_of(section: ModelSection, adapter: SavedAdapter) -> Any:
    """The class of Transformers whose layers an adapter has: the adapter's, else the checkpoint's.

    Args:
        section: the base model.
        adapter: of it.

    Returns:
        The class.

    Raises:
        AdapterError: if neither tells.
    """
    config = model_config(section)
    named = base_class(adapter.config.to_dict())
    of_text = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    if named is None or (named == "AutoModelForCausalLM" and not of_text):  # vision and language
        named = next(iter(config.architectures or []), named)
    found = getattr(transformers, str(named), None)
    if not hasattr(found, "from_pretrained"):
        raise AdapterError(
            f"{adapter.directory!r} has no task_type and no class of Transformers in its "
            f"adapter_config.json, and the checkpoint of {section.name!r} names none either (got "
            f"{named!r}); write the task, such as 'SEQ_CLS', into the adapter's task_type."
        )
    return found


def load_base(name: str, adapter: SavedAdapter) -> nn.Module:
    """Load a base model that an adapter fits, with as many tokens as the adapter's saved embedding.

    Args:
        name: Hub name or folder.
        adapter: whose layers it has to have.

    Returns:
        The model.

    Raises:
        AdapterError: if the model lacks a layer, or has it in another shape.
    """
    section = model_section(name, adapter)
    model = load_model(section, auto_class=class_of(section, adapter))
    _tell(model, adapter.facts)
    _resize(model, name, adapter)
    modules = dict(model.named_modules())
    for layer, update in adapter.layers.items():
        want = (update.B.shape[0], update.A.shape[1])
        got = linear_shape(modules[layer]) if layer in modules else None
        if got != want:
            raise AdapterError(
                f"the base model {name!r} does not fit {adapter.directory!r}: {layer} is {got} in "
                f"the model and {want} in the adapter; give the model that it was trained on."
            )
    return model


def load_processor(*names: str) -> Any:
    """Load the tokenizer or processor of the first place that has one.

    Args:
        names: Hub names or folders.

    Returns:
        It; `None` if no place has one.
    """
    for where in map(location, names):
        if any(has_file(where, file) for file in _PROCESSORS):
            return AutoProcessor.from_pretrained(where)
    return None


def _tell(model: Any, facts: Mapping[str, Any]) -> None:
    """Write into a model's config what the adapted one had there: its classes, its padding token.

    Args:
        model: with the adapter's head.
        facts: of the adapter.
    """
    classes, padding = facts.get("classes") or (), facts.get("padding")
    if len(classes) == getattr(model.config, "num_labels", None):
        model.config.id2label = dict(enumerate(classes))
        model.config.label2id = {name: i for i, name in enumerate(classes)}
    if padding is not None:
        give_padding_token(model, padding)


def _resize(model: Any, name: str, adapter: SavedAdapter) -> None:
    """Add the tokens that an adapter's saved embedding has and its base lacks.

    Raises:
        AdapterError: if the adapter does not hold all that grows, which would be random.
    """
    if not hasattr(model, "get_input_embeddings"):
        return
    names = {id(module): n for n, module in model.named_modules()}
    embedding, output = model.get_input_embeddings(), model.get_output_embeddings()
    whole = {key: t.shape[0] for key, t in adapter.others.items() if key.endswith(".weight")}
    saved = {base_name(key): rows for key, rows in whole.items()}
    rows = saved.get(f"{names.get(id(embedding))}.weight")
    if rows is None or rows == embedding.weight.shape[0]:
        return
    is_tied = output is None or output.weight is embedding.weight
    if not is_tied and saved.get(f"{names[id(output)]}.weight") != rows:
        raise AdapterError(
            f"{adapter.directory!r} holds an embedding of {rows} tokens, {name!r} has one of "
            f"{embedding.weight.shape[0]}, and the adapter lacks the output layer "
            f"{names[id(output)]!r} of so many; give the model that it was trained on, resized and saved."
        )
    model.resize_token_embeddings(rows, mean_resizing=False)


def weights_of(name: str, adapter: SavedAdapter) -> Callable[[str], Tensor]:
    """Load a base model and give its weights one by one.

    Weights that the adapter was not made on give a warning and no error: they may be those that its
    base was quantised from.

    Args:
        name: Hub name or folder.
        adapter: whose layers will be asked for.

    Returns:
        `(out, in)`, float32, of a layer by its name.
    """
    model = load_base(name, adapter)
    try:
        check_base(model, adapter.directory)
    except FingerprintError as error:
        warn(f"{error} What follows is right only if its base was quantised from {name!r}.")
    modules = dict(model.named_modules())
    return lambda layer: linear_weight(modules[layer])
