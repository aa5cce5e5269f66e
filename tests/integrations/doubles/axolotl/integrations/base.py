"""The hooks of axolotl 0.19.0 that the plug-in fills, with their published signatures."""

import importlib
from dataclasses import dataclass


@dataclass(frozen=True)
class AdapterCapabilities:
    name: str
    lora_like: bool = False
    relora: bool = False


class BasePlugin:
    def get_input_args(self): ...

    def get_adapter_capabilities(self):
        return []

    def pre_model_load(self, cfg): ...

    def load_adapter(self, model, cfg, inference=False, config_only=False): ...

    def add_callbacks_post_trainer(self, cfg, trainer):
        return []


def load_plugin(plugin_name):
    module_name, class_name = plugin_name.rsplit(".", 1)
    return getattr(importlib.import_module(module_name), class_name)()
