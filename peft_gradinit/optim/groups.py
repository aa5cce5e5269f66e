"""From a model to groups of parameters: the pairs in one, everything else by its decay.

In the group of the pairs, `A` and `B` alternate; `scalings`, `experts` and `outputs` have one entry a
pair. The order is all that tells a pair, so that FSDP2 and Accelerate can put other parameters in their
place.
"""

from collections.abc import Iterable, Sequence
from typing import Any

from accelerate.state import AcceleratorState, is_initialized
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from ..errors import ConfigError, first_of
from ..layouts import plain_name
from ..layouts.tensor_parallel import replicas
from ..layouts.zero3 import is_partitioned
from ..tuners import Pair, pairs
from .stacks import Slot, check_placed

_DEEPSPEED = (
    "DeepSpeed, whose ZeRO hands an optimiser flat parts of all parameters, in which no pair can be "
    "told. Adapters are small: train with DDP, or shard the base with FSDP2"
)
_FSDP1 = (
    "FSDP1, which flattens the factors and cuts pairs apart. Use FSDP2 (fsdp_version: 2 in Accelerate, "
    "fully_shard in torch) or DDP"
)
_VARIANTS = {"DoraLinearVariant", "ALoraLinearVariant", "MiCALinearVariant", "VeloraLinearVariant"}
"""PEFT's variants of LoRA whose weight moves by `B A`."""
OF_MODEL = ("scalings", "experts", "outputs")
"""What the group of the pairs says of the model, and no checkpoint may change."""
_MAGNITUDE = "lora_magnitude_vector"
"""In the names of DoRA's magnitudes, of which those of convolutions have several dimensions."""


def check_layout(model: nn.Module, optimizer: str) -> None:
    """Refuse the layouts in which a pair's factors cannot be had.

    Raises:
        ConfigError: if it is no model; under FSDP1, DeepSpeed and tensor parallelism.
    """
    if not isinstance(model, nn.Module):
        raise ConfigError(
            f"{optimizer} is made from the model, which tells what its pairs are, got "
            f"{type(model).__name__}. Pass the model itself, not its parameters; give Trainer "
            'optimizer_cls_and_kwargs=optimizer("...", lr=...) of peft_gradinit.optim.'
        )
    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ConfigError(f"{optimizer} does not work under {_FSDP1}.")
    by_deepspeed = is_initialized() and AcceleratorState().distributed_type.value == "DEEPSPEED"
    if by_deepspeed or any(is_partitioned(p) for p in model.parameters()):
        raise ConfigError(f"{optimizer} does not work under {_DEEPSPEED}.")
    if replicas(model) is not None:
        raise ConfigError(
            f"{optimizer} does not work under tensor parallelism, which cuts the factors along their "
            "inputs or outputs. Use torch.optim.AdamW, or FSDP2 in place of tensor parallelism."
        )


def trainable_pairs(model: nn.Module, adapters: str | Sequence[str], optimizer: str) -> list[Pair]:
    """The pairs of some adapters of which at least one factor trains.

    Of several adapters those are taken as well that do not train now: `set_adapter` freezes all but one, and a
    pair without a gradient stands still.

    Args:
        model: the model with the adapters.
        adapters: one name, or several.
        optimizer: its name, for errors.

    Returns:
        The pairs, in the order of the model, each once.

    Raises:
        ConfigError: if there are none, or if pairs of other adapters train as well.
    """
    names = _adapters(model, adapters, optimizer)
    found = _unique(pair for name in names for pair in pairs(model, name))
    _check_products(found, optimizer)
    _check_apart(model, found, optimizer)
    training = [pair for pair in found if _moves(pair)]
    others = [n for n in _names(model) if n not in names and _trains(model, n)]
    if others:
        own = [n for n in names if n in _names(model)]
        raise ConfigError(
            f"{optimizer} was made for adapter_name={adapters!r}, but pairs of {others} train as well; "
            f"pass adapter_name={[*own, *others]}, or freeze the others with set_adapter."
        )
    if not training:
        state = "none of them trains" if found else "the model has none"
        raise ConfigError(
            f"{optimizer} steps the pairs A, B of a LoRA adapter, and of adapter_name={adapters!r} "
            f"{state}. Adapters with LoRA layers: {_names(model)}. Pass the name of one that trains. "
            "Embeddings and convolutions have no pairs of matrices, nor has SVFit: they train with "
            "torch.optim.AdamW."
        )
    waiting = (p for n in names if not _trains(model, n) for p in pairs(model, n))
    return _unique([*training, *waiting])


def group_of_pairs(
    model: nn.Module, found: Sequence[Pair], optimizer: str, **settings: Any
) -> dict[str, Any]:
    """The group of the pairs.

    Raises:
        ConfigError: if a pair is multiplied by zero, or cut in a way that is not served.
    """
    for pair in found:
        if not pair.scaling:
            raise ConfigError(
                f"{optimizer}: the pair of {pair.name} has a scaling of 0, so that nothing it does is "
                "seen; pass a lora_alpha (or alpha_pattern) other than 0, or do not adapt the layer."
            )
        for factor in (pair.A, pair.B):
            check_placed(factor, optimizer)
    outputs = _output_layers(model)
    return {
        "params": [factor for pair in found for factor in (pair.A, pair.B)],
        "scalings": [float(pair.scaling) for pair in found],
        "experts": [pair.n_experts for pair in found],
        "outputs": [any(pair.layer is layer for layer in outputs) for pair in found],
        **settings,
    }


def groups_of_rest(
    model: nn.Module, found: Sequence[Pair], lr: float | None, decay: float, optimizer: str
) -> list[dict[str, Any]]:
    """The groups for AdamW: matrices with decay, and vectors without.

    Raises:
        ConfigError: if there are such parameters and no rate for them.
    """
    rest = _rest(model, found)
    if rest and lr is None:
        raise ConfigError(
            f"{optimizer}: {first_of([name for name, _ in rest])} train as well and are in no pair; AdamW steps them. Pass "
            "head_lr, its rate (1e-2, say; training.head_learning_rate of a recipe), or freeze them."
        )
    vectors = [p for n, p in rest if p.ndim <= 1 or _MAGNITUDE in n]
    matrices = [p for n, p in rest if p.ndim > 1 and _MAGNITUDE not in n]
    kinds = [(matrices, decay), (vectors, 0.0)]
    return [{"params": ps, "lr": lr, "weight_decay": d} for ps, d in kinds if ps]


def slots_of(group: dict[str, Any], optimizer: str) -> list[Slot]:
    """The pairs of a group, checked to be pairs still.

    Raises:
        ConfigError: if the parameters are no longer the factors that the group was made from.
    """
    factors, scalings = group["params"], group["scalings"]
    if len(factors) != 2 * len(scalings) or any(p.ndim != 2 for p in factors):
        shapes = [tuple(p.shape) for p in factors[:2]]
        raise ConfigError(
            f"{optimizer} was made for {len(scalings)} pairs of matrices, and has "
            f"{len(factors)} parameters now, the first ones of shapes {shapes}: they were "
            f"flattened after the optimiser was made. It does not work under {_DEEPSPEED}. Nor "
            f"does it under {_FSDP1}."
        )
    for factor in factors:
        check_placed(factor, optimizer)
    outputs = group.get("outputs", [False] * len(scalings))  # older checkpoints have none
    halves = zip(factors[::2], factors[1::2], scalings, group["experts"], outputs, strict=True)
    return [Slot(*pair) for pair in halves]


def _output_layers(model: nn.Module) -> list[nn.Module]:
    """The layers that give the logits of the language models of Transformers inside a model."""
    hosts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    return [layer for host in hosts if (layer := host.get_output_embeddings()) is not None]


def _adapters(model: nn.Module, given: Any, optimizer: str) -> list[str]:
    names = [given] if isinstance(given, str) else given
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ConfigError(
            f"{optimizer}: adapter_name must be a name or a list of names, got {given!r}."
        )
    known = _names(model)
    unknown = [name for name in names if name not in known]
    if unknown and len(names) > 1:
        raise ConfigError(
            f"{optimizer}: no LoRA layer has an adapter named {unknown}; adapters: {known}."
        )
    return list(names)


def _check_products(found: Sequence[Pair], optimizer: str) -> None:
    """Refuse variants of LoRA whose weight is not `B A`, or `B A` and a magnitude.

    Raises:
        ConfigError: for KaSA, BD-LoRA and the like.
    """
    for pair in found:
        found_variant = pair.layer.lora_variant.get(pair.adapter_name)
        variant = type(found_variant).__name__
        if found_variant is not None and variant not in _VARIANTS:
            raise ConfigError(
                f"{optimizer} steps products B A, and {pair.name} adapts its weight in another way "
                f"({variant.removesuffix('LinearVariant')}); train it with torch.optim.AdamW."
            )


def _check_apart(model: nn.Module, found: Sequence[Pair], optimizer: str) -> None:
    """Refuse factors that are in two pairs, or of which another parameter is a view.

    Raises:
        ConfigError: if there are such, which would be stepped twice.
    """
    factors = [(pair.name, factor) for pair in found for factor in (pair.A, pair.B)]
    seen: dict[Any, str] = {}
    for name, parameter in (*factors, *_rest(model, found)):
        place = _place(parameter)
        if place is None:
            continue
        if place in seen:
            raise ConfigError(
                f"{optimizer}: {seen[place]} and {name} share a factor, which would be stepped twice "
                "and by two rules; adapt one of them, leave ensure_weight_tying out, or train with "
                "torch.optim.AdamW."
            )
        seen[place] = name


def _rest(model: nn.Module, found: Sequence[Pair]) -> list[tuple[str, nn.Parameter]]:
    """The parameters that train and are in no pair, after their names."""
    known = {id(factor) for pair in found for factor in (pair.A, pair.B)}
    named = model.named_parameters()
    return [(plain_name(n), p) for n, p in named if p.requires_grad and id(p) not in known]


def _place(parameter: Any) -> Any:
    """Where the numbers of a parameter begin; `None` for one without numbers here."""
    local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
    return (local.device, local.data_ptr()) if local.numel() and not local.is_meta else None


def _names(model: nn.Module) -> list[str]:
    layers = [module for module in model.modules() if isinstance(module, LoraLayer)]
    return list(dict.fromkeys(name for layer in layers for name in layer.r))


def _trains(model: nn.Module, name: str) -> bool:
    return any(map(_moves, pairs(model, name)))


def _moves(pair: Pair) -> bool:
    return pair.A.requires_grad or pair.B.requires_grad


def _unique(found: Iterable[Pair]) -> list[Pair]:
    """Pairs that several layers share, once."""
    return list({(id(pair.A), id(pair.B)): pair for pair in found}.values())
