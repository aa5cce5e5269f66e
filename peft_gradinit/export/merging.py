"""The base model with an adapter merged, as a new model; the live one is only read."""

import copy
from typing import Any

import torch
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ExportError
from ..starts import is_quantized


def merged_model(model: Any, adapter_name: str) -> PreTrainedModel:
    """Build a model of the base's class, in eval mode, with the adapter merged into its weights.

    Only adapted layers are copied, one at a time. All other weights are shared with the live model,
    so they must not be written. An adapted head that is tied to the embedding is untied.
    """
    _check_mergeable(model)
    config = copy.deepcopy(model.config)
    tensors = _tensors(_skeleton(model, config), model, adapter_name)
    if _must_untie(model, tensors):
        config.tie_word_embeddings = False
    fresh = _skeleton(model, config)
    names = fresh.state_dict().keys()
    fresh.load_state_dict({name: tensors[name] for name in names}, assign=True)
    fresh.tie_weights()
    if getattr(model, "generation_config", None) is not None:  # classifiers have none
        fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh.eval()


def _check_mergeable(model: nn.Module) -> None:
    if not isinstance(model, PreTrainedModel):
        raise ExportError(
            f"target='merged' writes transformers models, got a {type(model).__name__}; use "
            "merge_and_unload() and save the result as you save that model."
        )
    for name, module in model.named_modules():
        if not isinstance(module, BaseTunerLayer):
            continue
        if module.merged:
            raise ExportError(
                f"the adapters {module.merged_adapters} are merged into {name} already; call "
                "unmerge_adapter() first."
            )
        if is_quantized(module.get_base_layer()):
            raise ExportError(
                f"{name} is quantised, and merging would round the adapter away; load the base "
                "unquantised, add the saved adapter with PeftModel.from_pretrained, and export "
                "that."
            )


def _skeleton(model: PreTrainedModel, config: Any) -> PreTrainedModel:
    """A model of the same class on the meta device."""
    with torch.device("meta"):
        return type(model)(config)


def _tensors(fresh: nn.Module, live: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """The merged weights and buffers, by their names in a model without adapters."""
    tensors: dict[str, Tensor] = {}

    def visit(plain: nn.Module, module: nn.Module, prefix: str) -> None:
        module = _merged(module, adapter_name)
        own = [*plain.named_parameters(recurse=False), *plain.named_buffers(recurse=False)]
        for name, _ in own:
            tensors[prefix + name] = getattr(module, name).detach()
        for name, child in plain.named_children():
            visit(child, module.get_submodule(name), f"{prefix}{name}.")

    visit(fresh, live, "")
    return tensors


def _merged(module: nn.Module, adapter_name: str) -> nn.Module:
    if isinstance(module, TrainableTokensWrapper):
        return _merged(module.token_adapter, adapter_name)
    if isinstance(module, ModulesToSaveWrapper):
        if adapter_name not in module.modules_to_save:
            return module.original_module
        return module.modules_to_save[adapter_name]
    if isinstance(module, AuxiliaryTrainingWrapper):
        raise ExportError(f"target='merged' cannot merge a {type(module).__name__}.")
    if not isinstance(module, BaseTunerLayer):
        return module
    # Each parameter of a module of experts has a wrapper of its own, around the one before.
    has_wrapper = isinstance(module.base_layer, BaseTunerLayer | AuxiliaryTrainingWrapper)
    if adapter_name not in module._all_available_adapter_names():
        inner: Any = module.base_layer
        return _merged(inner, adapter_name) if has_wrapper else inner
    duplicate: Any = copy.deepcopy(module)
    if has_wrapper:  # of the duplicate, since merging writes
        duplicate.base_layer = _merged(duplicate.base_layer, adapter_name)
    if isinstance(duplicate, MultiheadAttention):
        return duplicate.unload_and_optionally_merge_module(
            merge=True, safe_merge=True, adapter_names=[adapter_name]
        )
    duplicate.merge(safe_merge=True, adapter_names=[adapter_name])
    return duplicate.get_base_layer()


def _must_untie(model: PreTrainedModel, tensors: dict[str, Tensor]) -> bool:
    """Whether the adapter has changed one of two tied weights."""
    if not getattr(model.config, "tie_word_embeddings", False):
        return False
    tied = model.all_tied_weights_keys
    pairs = [(tensors[a], tensors[b]) for a, b in tied.items() if a in tensors and b in tensors]
    apart = any(a.data_ptr() != b.data_ptr() and not torch.equal(a, b) for a, b in pairs)
    if apart and model.config.is_encoder_decoder:
        raise ExportError(
            f"the adapter changes one of the tied weights {sorted(tied)}, and a "
            f"{type(model).__name__} computes something else once they are untied; save the "
            "adapter with target='peft'."
        )
    return apart
