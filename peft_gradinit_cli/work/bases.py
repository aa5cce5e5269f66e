"""Weights of a base model, by the names that an adapter has for its layers."""

from collections.abc import Callable

from torch import Tensor, nn

from peft_gradinit.errors import AdapterError
from peft_gradinit.recipes import ModelSection, load_model, section_of
from peft_gradinit.records import SavedAdapter
from peft_gradinit.starts import linear_shape, linear_weight

_HEADS = ("classifier.weight", "classifier.out_proj.weight", "score.weight")
"""What the heads of classifiers end with."""


def model_section(name: str, adapter: SavedAdapter) -> ModelSection:
    """The base model of an adapter, with a head of the size that the adapter holds.

    Args:
        name: Hub name or folder.
        adapter: tells the task, the classes of a head that it has trained, and, if the model is
            the one that it names, the revision.

    Returns:
        The section.
    """
    tasks = ("CAUSAL_LM", "SEQ_2_SEQ_LM", "SEQ_CLS")
    task = str(getattr(adapter.config.task_type, "value", adapter.config.task_type))
    named = adapter.config.base_model_name_or_path == name
    heads = [t.shape[0] for k, t in adapter.others.items() if k.endswith(_HEADS) and t.dim() == 2]
    return section_of(
        ModelSection,
        name=name,
        task=task if task in tasks else None,
        revision=adapter.config.revision if named else None,
        n_labels=heads[-1] if heads else None,
    )


def load_base(name: str, adapter: SavedAdapter) -> nn.Module:
    """Load a base model that an adapter fits.

    Args:
        name: Hub name or folder.
        adapter: whose layers it has to have.

    Returns:
        The model.

    Raises:
        AdapterError: if the model lacks a layer, or has it in another shape.
    """
    model = load_model(model_section(name, adapter))
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


def weights_of(name: str, adapter: SavedAdapter) -> Callable[[str], Tensor]:
    """Load a base model and give its weights one by one.

    Args:
        name: Hub name or folder.
        adapter: whose layers will be asked for.

    Returns:
        `(out, in)`, float32, of a layer by its name.
    """
    modules = dict(load_base(name, adapter).named_modules())
    return lambda layer: linear_weight(modules[layer])
