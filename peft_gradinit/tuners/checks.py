"""Checks that the tuners of all types make: names of adapters, and entries to be saved."""

from collections.abc import Mapping

from torch import Tensor, nn

from ..errors import ConfigError


def check_adapter_name(name: str, prefix: str) -> None:
    """Refuse a name, before any data are read, that PEFT could not inject, save or load again.

    Args:
        name: the adapter's name.
        prefix: start of the names of the type's parameters, `"lora_"` or `"svfit_"`.

    Raises:
        ConfigError: if it is such a name.
    """
    if not name:
        why = "it is empty"
    elif "." in name:
        why = "it has a dot, which separates the parts of a parameter's name"
    elif hasattr(nn.ModuleDict, name):
        why = "torch's ModuleDict, which holds adapters by name, has an attribute of that name"
    elif prefix in name:
        why = f"it has {prefix!r} in it, by which PEFT finds the parameters of adapters"
    elif name.startswith(("/", "\\")):
        why = "it is an absolute path, and the adapter's folder is named after it"
    else:
        return
    raise ConfigError(
        f"an adapter cannot be called {name!r}: {why}; choose another adapter_name, such as "
        "'default' or 'german'."
    )


def check_not_empty(
    entries: Mapping[str, Tensor], state_dict: Mapping[str, Tensor], adapter_name: str
) -> None:
    """Refuse to save an adapter of which a state dict holds nothing.

    An empty state dict is that of a process that does not save.

    Args:
        entries: the adapter's entries in the state dict.
        state_dict: the state dict of the model.
        adapter_name: the adapter's name.

    Raises:
        ConfigError: if the state dict has entries, but none of the adapter.
    """
    if state_dict and not entries:
        raise ConfigError(
            f"the state dict has {len(state_dict)} entries ({next(iter(state_dict))}, …), but none "
            f"of adapter {adapter_name!r}, which would be saved empty; pass the state dict of the "
            "whole model (under FSDP that of the outermost module), with the names that PEFT gave."
        )
