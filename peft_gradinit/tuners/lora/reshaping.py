"""Ranks that a deferred adapter gets after its injection, from its start or from a checkpoint.

Factors of another rank are other parameters. An optimiser, DDP or FSDP that was given the old ones
would go on with those, so the ranks can only change before there is one.
"""

import copy
import gc
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from ...errors import ConfigError
from ...layouts import is_sharded, plain_name
from ...records import AdapterRecord, is_prefixed, name_in_file, scaling
from ...starts import GradInitConfig, Target, resized, without_empty, write_patterns
from .pairs import adapted_layers, live_targets, n_experts

WAYS_AROUND = (
    "calibrate first (calibrate(model, config, data).save(path), then calibration=path in the "
    "config), or keep the ranks with rank_allocation='uniform'"
)
"""For errors where the ranks cannot come from the data."""
Undo = Callable[[], None]


@contextmanager
def reshaped(model: nn.Module, adapter_name: str, targets: Mapping[str, Target]) -> Iterator[bool]:
    """Give a deferred adapter the ranks of `targets`; if the block fails, it gets its own back.

    Layers of rank 0 lose the adapter.

    Yields:
        Whether a rank has changed.

    Raises:
        ConfigError: if the model is sharded, or something else uses the parameters already.
    """
    wanted = {t.adapted: t for t in targets.values() if t.shape is not None}
    changed = {
        name: layer
        for name, layer in adapted_layers(model, adapter_name)
        if name in wanted and layer.r[adapter_name] != wanted[name].r
    }
    if not changed:
        yield False
        return
    _check_free(model, adapter_name, changed.values())
    undo: list[Undo] = []
    try:
        for name, layer in changed.items():
            if wanted[name].r:
                undo.append(_resize(layer, adapter_name, wanted[name]))
            else:
                undo.append(_remove(model, layer, adapter_name))
        yield True
    except BaseException:
        for step in reversed(undo):
            step()
        raise


def note_shapes(
    record: AdapterRecord, config: GradInitConfig, targets: Mapping[str, Target]
) -> None:
    """Write into a record what an injection with these targets would have written."""
    injected = copy.copy(config)
    without_empty(injected, targets)
    record.requested_ranks = write_patterns(targets, injected)
    record.resolved = differences(injected, config)
    record.ranks = {t.adapted: t.r for t in targets.values() if t.r}


def differences(injected: GradInitConfig, config: GradInitConfig) -> dict[str, Any]:
    """The options of an injection with other values than in the user's config."""
    names = ("exclude_modules", "target_parameters", "rank_pattern", "alpha_pattern")
    values = {name: getattr(injected, name) for name in names}
    return {name: value for name, value in values.items() if value != getattr(config, name)}


def targets_in_file(
    model: nn.Module, adapter_name: str, config: GradInitConfig, entries: Mapping[str, Tensor]
) -> dict[str, Target]:
    """The targets of a deferred adapter with the ranks that a state dict in the file's form has.

    A layer that the state dict lacks gets rank 0 if the config allows that, else it keeps its own.
    """
    sizes = {
        name: tensor.shape[0]
        for key, tensor in entries.items()
        for name, _, rest in [key.rpartition(".lora_A.")]
        if name and rest.endswith("weight") and tensor.dim() > 1
    }
    paths = {id(module): path for path, module in model.named_modules()}
    ranks: dict[str, int | None] = {}
    for name, layer in adapted_layers(model, adapter_name):
        key = name_in_file(plain_name(paths[id(layer)]), prefixed=is_prefixed(entries))
        per_rank = n_experts(layer) * (2 if config.anchored else 1)
        absent = 0 if config.min_rank == 0 else None
        ranks[name] = sizes[key] // per_rank if key in sizes else absent
    targets = {}
    for name, target in live_targets(model, adapter_name).items():
        r = ranks[target.adapted]
        targets[name] = target if r is None else resized(target, r, config)
    return targets


def _check_free(model: nn.Module, adapter_name: str, layers: Iterable[Any]) -> None:
    """Refuse to replace parameters that something else has been given already."""
    parameters = {id(p) for layer in layers for p in layer.parameters() if p.requires_grad}
    if not parameters:
        return
    said = f"adapter {adapter_name!r} gets its ranks from the data, and with them new parameters"
    if is_sharded(model):
        raise ConfigError(f"{said}, but the model is sharded already; {WAYS_AROUND}.")
    if holder := _holder(parameters):
        raise ConfigError(
            f"{said}, but {holder} was made before and would go on with the old ones; make it after "
            f"initialize(model, data), {WAYS_AROUND}."
        )


def _holder(parameters: set[int]) -> str | None:
    """Name of the class of a live optimiser or DDP that has some of these parameters."""
    gc.collect()  # those of an earlier run that has ended
    for thing in gc.get_objects():
        kind = type(thing)
        if issubclass(kind, Optimizer):
            used = (p for group in getattr(thing, "param_groups", ()) for p in group["params"])
        elif issubclass(kind, DistributedDataParallel):
            used = thing.parameters()
        else:
            continue
        if any(id(p) in parameters for p in used):
            return kind.__name__
    return None


def _resize(layer: Any, adapter_name: str, target: Target) -> Undo:
    """Give both factors, and their anchors, another rank; `A` is random, the rest are zeros."""
    before = {name: dict(getattr(layer, name)) for name in ("r", "lora_alpha", "scaling")}
    n, r = n_experts(layer), target.r
    layer.r[adapter_name], layer.lora_alpha[adapter_name] = r, target.alpha
    use_rslora = layer.use_rslora.get(adapter_name, False)
    layer.scaling[adapter_name] = scaling(target.alpha, r, use_rslora=use_rslora)
    A, B = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
    undo = [_resize_factor(A, 0, n * r), _resize_factor(B, 1, n * r)]
    _draw(A)

    def restore() -> None:
        for name, values in before.items():
            getattr(layer, name).update(values)
        for step in undo:
            step()

    return restore


def _resize_factor(linear: Any, dim: int, size: int) -> Undo:
    """Replace the weight of a factor, `(r, in)` with `dim` 0 or `(out, r)` with 1, by zeros."""
    features = "out_features" if dim == 0 else "in_features"
    n_before = getattr(linear, features)
    owner, name = _owner(linear)
    weight = getattr(owner, name)
    anchor = owner[0].anchor if owner is not linear else None
    setattr(owner, name, nn.Parameter(_zeros(weight, dim, size), weight.requires_grad))
    if anchor is not None:
        owner[0].anchor = _zeros(anchor, dim, size)
    setattr(linear, features, size)

    def restore() -> None:
        setattr(owner, name, weight)
        if anchor is not None:
            owner[0].anchor = anchor
        setattr(linear, features, n_before)

    return restore


def _owner(linear: Any) -> tuple[Any, str]:
    """What holds the trainable weight of a factor, and under which name."""
    if parametrize.is_parametrized(linear, "weight"):
        return linear.parametrizations.weight, "original"
    return linear, "weight"


@torch.no_grad()
def _draw(linear: Any) -> None:
    """Draw `A` as PEFT does, for experts that get no start; the same in every process."""
    weight = getattr(*_owner(linear))
    values = torch.empty(weight.shape, dtype=torch.float32, device="cpu")
    generator = torch.Generator().manual_seed(weight.shape[0])
    nn.init.kaiming_uniform_(values, a=math.sqrt(5), generator=generator)
    weight.copy_(values)


def _zeros(tensor: Tensor, dim: int, size: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = size
    return tensor.detach().new_zeros(shape)


def _remove(model: nn.Module, layer: LoraLayer, adapter_name: str) -> Undo:
    """Take an adapter out of a layer, and the wrapper away if it was the only one."""
    if set(layer._all_available_adapter_names()) == {adapter_name}:
        # A wrapper inside another one, as those of experts are, has a new path once that is gone.
        path = next(path for path, module in model.named_modules() if module is layer)
        parent, _, child = path.rpartition(".")
        owner = model.get_submodule(parent)
        setattr(owner, child, layer.base_layer)
        return lambda: setattr(owner, child, layer)
    names = (*layer.adapter_layer_names, *layer.other_param_names)
    holders: list[Any] = [getattr(layer, name, None) for name in names]
    taken = [(h, h.pop(adapter_name)) for h in holders if _has(h, adapter_name)]

    def restore() -> None:
        for holder, value in taken:
            holder[adapter_name] = value

    return restore


def _has(holder: Any, adapter_name: str) -> bool:
    return hasattr(holder, "pop") and adapter_name in holder
