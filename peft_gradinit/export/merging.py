"""The base model with an adapter merged, as a new model; the live one is only read."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from peft.tuners.lora.layer import MultiheadAttention
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper, ModulesToSaveWrapper, TrainableTokensWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel

from ..errors import ExportError, first_of
from ..layouts import is_hqq, is_offloaded, offloaded_value, onloaded
from ..starts import is_quantized


def merged_model(model: Any, adapter_name: str) -> PreTrainedModel:
    """Build a model of the base's class, in eval mode, with the adapter merged into its weights.

    Only adapted layers are copied, one at a time. All other weights are shared with the live model,
    so they must not be written; those that wait on disk are read. Weights that its config ties and
    that differ, since the adapter has changed one or the checkpoint had two, are not tied.
    """
    check_mergeable(model, adapter_name)
    config = copy.deepcopy(model.config)
    fresh = _skeleton(model, config)
    tensors = _tensors(fresh, model, adapter_name)
    apart = _apart(fresh.all_tied_weights_keys, tensors)
    if apart:
        _untie(model, config, apart)
        fresh = _skeleton(model, config)
    names = fresh.state_dict().keys()
    fresh.load_state_dict({name: tensors[name] for name in names}, assign=True)
    for name in apart:
        fresh.all_tied_weights_keys.pop(name, None)
    fresh.tie_weights(recompute_mapping=False)
    if getattr(model, "generation_config", None) is not None:  # classifiers have none
        fresh.generation_config = copy.deepcopy(model.generation_config)
    return fresh.eval()


def check_mergeable(model: nn.Module, adapter_name: str) -> None:
    """Refuse a model that cannot be written with its adapter merged."""
    if not isinstance(model, PreTrainedModel):
        raise ExportError(
            f"target='merged' writes transformers models, got a {type(model).__name__}; use "
            "merge_and_unload() and save the result as you save that model."
        )
    for name, module in model.named_modules():
        adapted: Any = module
        if isinstance(module, BaseTunerLayer) and adapted.merged:
            raise ExportError(
                f"the adapters {adapted.merged_adapters} are merged into {name} already; call "
                "unmerge_adapter() first."
            )
        if getattr(adapted, "lora_bias", {}).get(adapter_name) and not _has_bias(adapted):
            raise ExportError(
                f"lora_bias=True gives {name} a bias, and the base layer has no place for one; save "
                "the adapter with target='peft', or train without."
            )
        has_weight = isinstance(adapted._parameters.get("weight"), Tensor)
        if (has_weight or is_hqq(adapted)) and is_quantized(adapted):
            raise ExportError(
                f"{name.removesuffix('.base_layer')} is quantised, and a merged model would be, too: "
                "merging rounds an adapter away. Load the base unquantised, add the saved adapter "
                "with PeftModel.from_pretrained, and export that."
            )
    _check_is_of_its_class(model, adapter_name)


def _check_is_of_its_class(model: PreTrainedModel, adapter_name: str) -> None:
    """Refuse a model that was changed after it was made, since its class reads what its config says.

    Raises:
        ExportError: naming weights that are there or in the class alone, or that have other shapes.
    """
    fresh = _skeleton(model, copy.deepcopy(model.config))
    if differing := list(_differences(fresh, model, adapter_name, "")):
        raise ExportError(
            f"a {type(model).__name__} of this model's config has other weights than this model: "
            f"{first_of(differing, '; ')}; what is written would load as another model. Make the config say "
            "what the model is (config.num_labels, say), or use merge_and_unload() and save the result as you save "
            "that model."
        )


def _differences(
    plain: nn.Module, module: nn.Module, adapter_name: str, prefix: str
) -> Iterator[str]:
    module = _without_adapter(module, adapter_name)
    read, held = _saved(plain), _saved(module)
    for name in read:
        if getattr(module, name, None) is None:
            yield f"{prefix}{name} is missing"
        elif (there := getattr(module, name).shape) != read[name].shape:
            yield f"{prefix}{name} has shape {tuple(there)}, not {tuple(read[name].shape)}"
    yield from (
        f"{prefix}{name} is not read" for name in held if getattr(plain, name, None) is None
    )
    children = dict(module.named_children())
    for name, child in plain.named_children():
        if name in children:
            yield from _differences(child, children[name], adapter_name, f"{prefix}{name}.")
        elif child.state_dict():
            yield f"{prefix}{name} is missing"
    known = {"parametrizations", *dict(plain.named_children())}  # their values are the weights'
    for name, child in children.items():
        if name not in known and child.state_dict():
            yield f"{prefix}{name} is not read"


def _saved(module: nn.Module) -> dict[str, Tensor]:
    """The parameters and buffers of a module itself that are in files."""
    buffers = dict(module.named_buffers(recurse=False))
    kept = {k: v for k, v in buffers.items() if k not in module._non_persistent_buffers_set}
    return {**dict(module.named_parameters(recurse=False)), **kept}


def _without_adapter(module: Any, adapter_name: str) -> nn.Module:
    """What a wrapper of PEFT stands for, whose weights have the names and shapes of the merged ones."""
    if isinstance(module, TrainableTokensWrapper):
        return _without_adapter(module.token_adapter, adapter_name)
    if isinstance(module, ModulesToSaveWrapper):
        saved = dict(module.modules_to_save)
        return _without_adapter(saved.get(adapter_name, module.original_module), adapter_name)
    if isinstance(module, BaseTunerLayer):
        return _without_adapter(module.get_base_layer(), adapter_name)
    return module


def _has_bias(adapted: Any) -> bool:
    return getattr(adapted.get_base_layer(), "bias", None) is not None


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
            tensors[prefix + name] = _value(module, name)
        for name, child in plain.named_children():
            visit(child, module.get_submodule(name), f"{prefix}{name}.")

    visit(fresh, live, "")
    return tensors


def _value(module: nn.Module, name: str) -> Tensor:
    value = getattr(module, name)
    waits = value.is_meta and is_offloaded(module)
    return (offloaded_value(module, name) if waits else value).detach()


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
    duplicate = _duplicate(module)
    if has_wrapper:  # of the duplicate, since merging writes
        duplicate.base_layer = _merged(duplicate.base_layer, adapter_name)
    if isinstance(duplicate, MultiheadAttention):
        return duplicate.unload_and_optionally_merge_module(
            merge=True, safe_merge=True, adapter_names=[adapter_name]
        )
    duplicate.merge(safe_merge=True, adapter_names=[adapter_name])
    base: Any = module.get_base_layer()
    merged = duplicate.get_base_layer()
    return merged.cpu() if is_offloaded(base) else merged  # not all fit where they run


def _duplicate(module: BaseTunerLayer) -> Any:
    """A copy of an adapted layer, with the base's weights where they are offloaded.

    The copy shares the hook that loads them, which holds the weights of the whole model.
    """
    base: Any = module.get_base_layer()
    hook = getattr(base, "_hf_hook", None)
    with onloaded(base):
        return copy.deepcopy(module, {id(hook): hook})


def _apart(tied: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The pairs of a model that ties weights whose two weights differ."""

    def differ(a: Tensor, b: Tensor) -> bool:
        return a.data_ptr() != b.data_ptr() and not torch.equal(a.cpu(), b.cpu())

    known = {a: b for a, b in tied.items() if a in tensors and b in tensors}
    return {a: b for a, b in known.items() if differ(tensors[a], tensors[b])}


def _untie(model: PreTrainedModel, config: Any, apart: Mapping[str, str]) -> None:
    """Say in the config of a merged model that these weights are not tied.

    A model with an encoder and a decoder reads from its config as well what it computes. So that
    stays, and the two weights of its file tell that they are two.

    Raises:
        ExportError: if such a model ties them, and the adapter has changed one.
    """
    if not getattr(config, "is_encoder_decoder", False):
        for part in (config, config.get_text_config(decoder=True)):
            part.tie_word_embeddings = False
    elif changed := sorted(apart.keys() & model.all_tied_weights_keys.keys()):
        raise ExportError(
            f"the adapter changes one of the tied weights {changed}, and a "
            f"{type(model).__name__} computes something else once they are untied; save the "
            "adapter with target='peft'."
        )
