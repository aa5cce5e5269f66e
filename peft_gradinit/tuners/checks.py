"""Checks that the tuners of all types make before data are read."""

from typing import Any

from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from torch import nn

from ..errors import ConfigError, TargetError
from ..layouts import is_offloaded, uncompiled
from ..records import records_of
from ..starts import GradInitConfig, SpectralConfig, is_trained_in_full

_PARTS_OF_LAYERS = (*LoraLayer.adapter_layer_names, "lora_dropout")
"""Names of what PEFT keeps by adapter in a layer."""


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


def check_injected_once(tuner: BaseTuner, model: nn.Module, name: str) -> None:
    """Refuse a second `get_peft_model` on one model, as when a cell of a notebook is run again.

    PEFT would wrap the wrappers and overwrite an adapter of the same name; what it then saves does
    not load on the base model. The adapters that are there stay as they are.

    Args:
        tuner: the tuner that is about to inject.
        model: what it was made for.
        name: name of the new adapter.

    Raises:
        ConfigError: if the model is a `PeftModel`, or has an adapter of this name.
    """
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
    taken = any(name in layer._all_available_adapter_names() for layer in layers)
    if not taken and not isinstance(model, PeftModel):
        return
    record = records_of(model).get(name) if taken else None
    if record is not None:  # PEFT has put the new config in its place
        tuner.peft_config[name] = record.config
    elif not taken:
        tuner.peft_config.pop(name, None)
    what = f"an adapter {name!r}" if taken else "adapters (it is a PeftModel)"
    raise ConfigError(
        f"get_peft_model got a model that has {what} already; call model.unload() on the PeftModel "
        "first and pass what that returns, or add one beside it: model.add_adapter(name, config)."
    )


def check_not_compiled(tuner: BaseTuner, model: nn.Module, name: str) -> None:
    """Refuse a model inside the wrapper of `torch.compile`, which is a part of all its layers' names.

    What PEFT saves of such a model loads on no other one, since the wrapper is in the file as well.

    Args:
        tuner: the tuner that is about to inject.
        model: what it was made for.
        name: name of the new adapter.

    Raises:
        ConfigError: if it is one.
    """
    if uncompiled(model) is model:
        return
    tuner.peft_config.pop(name, None)
    raise ConfigError(
        "get_peft_model got a compiled model, and the adapter's file would name layers of the wrapper; "
        "pass the model itself and compile it afterwards: model = torch.compile(get_peft_model(model, "
        "config))."
    )


def check_host(
    model: nn.Module, config: GradInitConfig | SpectralConfig, adapter_name: str
) -> None:
    """Refuse a model that takes no such adapter beside those that it has.

    Args:
        model: the one to load into.
        config: of the adapter.
        adapter_name: the name that it is to have.

    Raises:
        ConfigError: if the name is taken, or if the model's adapters are of another type.
    """
    if not isinstance(model, PeftModel):
        return
    if adapter_name in model.peft_config:
        raise ConfigError(
            f"the model has an adapter {adapter_name!r} already; pass another adapter_name, or "
            f"delete_adapter({adapter_name!r}) before."
        )
    if model.peft_type != config.peft_type:
        raise ConfigError(
            f"a model of {model.peft_type} adapters takes no {config.method} adapter beside them; load both "
            "with PeftModel.from_pretrained and load_adapter, or this one alone."
        )


def check_modules_to_save(model: nn.Module, config: Any) -> None:
    """Refuse what cannot be trained in full, before any data are read.

    Args:
        model: the base model.
        config: of the adapter.

    Raises:
        ConfigError: if a name also ends that of a part of PEFT's layers, which PEFT would take.
        TargetError: if a module is offloaded.
    """
    for word in config.modules_to_save or ():
        if own := next((name for name in _PARTS_OF_LAYERS if name.endswith(word)), None):
            raise ConfigError(
                f"modules_to_save has {word!r}, which also ends {own!r}, a part of every adapted layer, and "
                "PEFT goes by the ends of names; write more of the module's name, or rename it."
            )
    for name, module in model.named_modules():
        if is_trained_in_full(name, config) and any(map(is_offloaded, module.modules())):
            raise TargetError(
                f"modules_to_save has {name}, which is offloaded: its copy would be dropped after "
                "each forward, and so never train; give it a place on the device in device_map."
            )
