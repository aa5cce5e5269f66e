"""Adapters on bases that Accelerate offloads to the CPU or to disk.

PEFT makes an adapter where it finds the base weight, which for an offloaded one is the meta device:
the adapter would hold nothing, and train on whatever is in memory. Here each layer is loaded while
its adapter is made, one at a time, and the adapter stays on the device on which the layer runs.
"""

from contextlib import suppress
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from torch import Tensor, nn

from ..calibration import has_offloaded, is_offloaded, offloaded_value, onloaded
from ..errors import TargetError


class OffloadedBase:
    """What a tuner model does so that its base may be offloaded; to be inherited before PEFT's."""

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
        **kw: Any,
    ) -> dict[str, Tensor]:
        # PEFT takes embeddings from it next, if they are targeted or were resized.
        state_dict.update(_offloaded_embeddings(model, state_dict))
        return super()._get_adapter_state_dict(  # pyright: ignore[reportAttributeAccessIssue]
            model, config, adapter_name, state_dict, *args, **kw
        )

    def unload(self) -> nn.Module:
        """Give the base model back without its adapters.

        PEFT's own loads every offloaded layer for it and makes its hook another map.

        Returns:
            The base model.
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


def check_modules_to_save(model: nn.Module, config: Any) -> None:
    """Refuse to train a copy of an offloaded module.

    Args:
        model: the base model.
        config: says what is trained in full.

    Raises:
        TargetError: naming the first such module.
    """
    wanted = tuple(config.modules_to_save or ())
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in wanted and any(map(is_offloaded, module.modules())):
            raise TargetError(
                f"modules_to_save has {name}, which is offloaded: its copy would be dropped after "
                "each forward, and so never train; give it a place on the device in device_map."
            )


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
    found = []
    for name in ("get_input_embeddings", "get_output_embeddings"):
        with suppress(AttributeError, NotImplementedError):  # not all models have both
            layer = getattr(model, name)()
            found.append(layer.get_base_layer() if isinstance(layer, BaseTunerLayer) else layer)
    return found


def _put_back(model: nn.Module, name: str, module: nn.Module) -> None:
    parent, _, child = name.rpartition(".")
    setattr(model.get_submodule(parent), child, module)
