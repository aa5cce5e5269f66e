"""Adapters on bases that Accelerate offloads to the CPU or to disk.

PEFT makes an adapter on the device of the base weight. An offloaded weight is on the meta device,
where the adapter would hold no values. Here each layer is loaded while its adapter is made, one at
a time, and the adapter stays on the device on which the layer runs.
"""

from contextlib import suppress
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..layouts import has_offloaded, is_offloaded, offloaded_value, onloaded


class OffloadedBase:
    """A tuner model whose base may be offloaded; must come before PEFT's class among the bases."""

    model: nn.Module

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, *args: Any, **kwargs: Any
    ) -> None:
        base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
        with onloaded(base):
            super()._create_and_replace(  # pyright: ignore[reportAttributeAccessIssue]
                peft_config, adapter_name, target, *args, **kwargs
            )

    @classmethod
    def _get_adapter_state_dict(
        cls,
        model: nn.Module,
        config: Any,
        adapter_name: str,
        state_dict: Any,
        *args: Any,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        # PEFT takes embeddings from `state_dict` next, if they are targeted or were resized.
        state_dict.update(_offloaded_embeddings(model, state_dict))
        return super()._get_adapter_state_dict(  # pyright: ignore[reportAttributeAccessIssue]
            model, config, adapter_name, state_dict, *args, **kwargs
        )

    def unload(self) -> nn.Module:
        """Return the base model without its adapters.

        PEFT's method loads every offloaded layer and replaces the map of weights in its hook.
        """
        if not has_offloaded(self.model):
            return super().unload()  # pyright: ignore[reportAttributeAccessIssue]
        for name, module in reversed(list(self.model.named_modules())):  # inner ones first
            if isinstance(module, BaseTunerLayer):
                _put_back(self.model, name, module.get_base_layer())
            elif isinstance(module, AuxiliaryTrainingWrapper):
                unloaded = module.unload_and_optionally_merge_module(
                    merge=False, safe_merge=False, adapter_names=None
                )
                _put_back(self.model, name, unloaded)
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        return self.model


def _offloaded_embeddings(model: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Values of the embeddings whose entries of a state dict are on the meta device."""
    if not has_offloaded(model):
        return {}
    embeddings = _embeddings(model)
    return {
        key: offloaded_value(module, name)
        for path, module in model.named_modules()
        if any(module is one for one in embeddings) and is_offloaded(module)
        for name, _ in module.named_parameters(recurse=False)
        if (key := f"{path}.{name}") in state_dict and state_dict[key].is_meta
    }


def _embeddings(model: Any) -> list[nn.Module]:
    """Input and output embeddings of a Transformers model, without adapters around them."""
    embeddings = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # not all models have both
            layer = getattr(model, name)()
            is_adapted = isinstance(layer, BaseTunerLayer)
            embeddings.append(layer.get_base_layer() if is_adapted else layer)
    return embeddings


def _put_back(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
