"""The base model that an adapter was made on: hashes that tell it, and its size."""

import re
from collections.abc import Collection
from types import SimpleNamespace
from typing import Any, cast

from peft import PeftModel
from torch import nn

from ..errors import TargetError
from ..layouts import model_fingerprint
from ..records import PREFIX

_ADAPTER_PARAMETERS = (".lora_", ".svfit_", ".modules_to_save.", ".trainable_tokens_")


def base_fingerprint(model: nn.Module, config: Any, saved: Collection[str] = ()) -> dict[str, str]:
    """Hashes of the base weights that an adapter depends on.

    Args:
        model: the base model.
        config: of the adapter; modules that it trains in full are left out.
        saved: keys of the adapter's file. Weights that it brings along are left out, with those
            tied to them: embeddings of a resized vocabulary, or those with trained tokens.
    """
    hashes = base_hashes(model)
    brought = {hashes[name] for key in saved if (name := base_name(key)) in hashes}
    return {
        name: value
        for name, value in hashes.items()
        if not is_trained_in_full(name, config) and value not in brought
    }


def is_trained_in_full(name: str, config: Any) -> bool:
    """Whether `modules_to_save` names a module, or one that holds it, by the end of its name as in PEFT."""
    parts = name.split(".")
    paths = [".".join(parts[: i + 1]) for i in range(len(parts))]
    return any(path.endswith(end) for path in paths for end in config.modules_to_save or ())


_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}
"""What PEFT adds to `modules_to_save` for a task; for the last two only after it has injected the adapter."""


def ends_as_head(name: str, config: Any) -> bool:
    """Whether PEFT would train a module in full because of how its name ends: the task's head, or one in `modules_to_save`."""
    ends = (*(config.modules_to_save or ()), *_HEADS.get(config.task_type or "", ()))
    return name.endswith(tuple(ends))


def check_no_head(name: str, config: Any) -> None:
    """Refuse, before any data are read, what PEFT refuses after that: an adapter on what it trains in full.

    Raises:
        TargetError: if the module is one.
    """
    if ends_as_head(name, config):
        raise TargetError(
            f"PEFT trains {name} in full, as its name ends like what task_type={config.task_type!r} or "
            f"modules_to_save={config.modules_to_save!r} names, so it cannot have an adapter; add {name!r} to "
            "exclude_modules."
        )


def base_name(key: str) -> str:
    """Name in the base model of the weight that an entry of an adapter's file replaces."""
    name = key.removeprefix(PREFIX).replace(".base_layer", "")
    return re.sub(r"(\.token_adapter)?\.trainable_tokens_delta$", ".weight", name)


def base_hashes(model: nn.Module) -> dict[str, str]:
    """Hashes of all base weights, by their names in a model without adapters."""
    hashes = model_fingerprint(model, skip=_ADAPTER_PARAMETERS)
    return {name.replace(".token_adapter", ""): value for name, value in hashes.items()}


def n_parameters(model: nn.Module) -> int:
    """Number of parameters of the base model as PEFT counts them, without those of adapters."""
    named = [
        (name, parameter)
        for name, parameter in model.named_parameters()
        if not any(part in f".{name}" for part in _ADAPTER_PARAMETERS)
    ]
    base = SimpleNamespace(named_parameters=lambda: named)
    return PeftModel.get_nb_trainable_parameters(cast("Any", base))[1]
