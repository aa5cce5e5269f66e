"""An adapter that is there already, as a framework loads it."""

import inspect
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
        more: options of `PeftModel.from_pretrained`; where training goes on, those that
            `load_for_training` has count (`adapter_name`, `revision`, `autocast_adapter_dtype`, …).

    Returns:
        The model with the adapter.
    """
    if not is_trainable:
        return PeftModel.from_pretrained(model, folder, **more)
    place = {n: more[n] for n in ("subfolder", "revision", "token") if n in more}
    if ((found := adapter_folder(folder, **place)) / PROVENANCE_FILE).exists():
        known = inspect.signature(load_for_training).parameters.keys() - place.keys()
        return load_for_training(model, found, **{n: v for n, v in more.items() if n in known})
    return PeftModel.from_pretrained(model, folder, is_trainable=True, **more)
