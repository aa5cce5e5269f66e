"""An adapter that is there already, as a framework loads it."""

from typing import Any

from peft import PeftModel
from torch import nn

from ..records import PROVENANCE_FILE, adapter_folder
from ..tuners import load_for_training


def continued(model: nn.Module, folder: str, *, is_trainable: bool, **more: Any) -> PeftModel:
    """Add a saved adapter to a model: as it was trained if training goes on, else as plain LoRA.

    Args:
        model: the base model.
        folder: of the adapter, or its name on the Hub.
        is_trainable: whether training goes on.
        more: passed on to `PeftModel.from_pretrained`.

    Returns:
        The model with the adapter.
    """
    if is_trainable and ((found := adapter_folder(folder)) / PROVENANCE_FILE).exists():
        return load_for_training(model, found)
    return PeftModel.from_pretrained(model, folder, is_trainable=is_trainable, **more)
