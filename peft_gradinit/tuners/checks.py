"""The check of an adapter's name that the tuners of all types make."""

from torch import nn

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
