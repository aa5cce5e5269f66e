"""The form of a LoRA adapter that inference servers read: one rank, scale 1, nothing else.

vLLM, SGLang and TGI read `r`, `lora_alpha`, `use_rslora` and `target_modules` of
`adapter_config.json` and apply one scale to all layers; they ignore `rank_pattern` and
`alpha_pattern`. vLLM refuses tensors other than `lora_A` and `lora_B`, and ranks above
`--max-lora-rank`. TGI drops all layers of a kind if one of them is missing. So every layer is
padded with zeros to the same rank, its scale goes into `B`, and a layer that lost its adapter gets
one that is zero.
"""

import re
from collections.abc import Iterable, Mapping

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from torch import nn

from ..errors import ExportError, first_of
from ..linalg import Factors
from ..records import PREFIX
from ..starts import linear_shape

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `max_lora_rank`."""

_REFUSED = {
    "modules_to_save": "servers load no whole modules",
    "use_dora": "servers do not know DoRA",
    "bias": "servers load no biases",
    "lora_bias": "servers load no biases of factors",
    "trainable_token_indices": "servers load no changed tokens",
    "target_parameters": "servers load no adapters of bare parameters",
    "layer_replication": "servers do not replicate layers",
    "alora_invocation_tokens": "servers would apply it to every token",
    "use_qalora": "servers do not pool inputs",
    "use_bdlora": "servers expect dense factors",
}


def check_servable(config: LoraConfig, others: Iterable[str]) -> None:
    """Refuse an adapter that servers cannot load; `others` are its keys beside linear factors."""
    reasons = [
        f"{name}={value!r} ({reason})"
        for name, reason in _REFUSED.items()
        if (value := getattr(config, name, None)) and value != "none"
    ]
    if keys := sorted(key.removeprefix(PREFIX) for key in others):
        reasons.append(f"the entries {first_of(keys)} (servers load factors of linear layers only)")
    if reasons:
        raise ExportError(
            f"target='serving' cannot hold this adapter: {'; '.join(reasons)}. Use "
            "target='merged' and serve the merged model, or train without."
        )


def served_rank(layers: Mapping[str, Factors]) -> int:
    """The least of `SERVED_RANKS` that all layers fit into."""
    largest = max(layers, key=lambda name: layers[name].r)
    for rank in SERVED_RANKS:
        if rank >= layers[largest].r:
            return rank
    raise ExportError(
        f"{largest} has rank {layers[largest].r}, and servers take at most {SERVED_RANKS[-1]}; "
        f"pass rank={SERVED_RANKS[-1]} or less to truncate, or use target='merged'."
    )


def completed(layers: Mapping[str, Factors], model: nn.Module) -> dict[str, Factors]:
    """Add a zero layer for every layer without an adapter whose kind has one, in model order.

    Two layers are of one kind if their names differ in numbers only.
    """
    some = next(iter(layers.values()))
    kinds, result = {_kind(name) for name in layers}, {}
    for name, module in _plain_modules(model).items():
        shape = linear_shape(module)
        if name in layers:
            result[name] = layers[name]
        elif shape is not None and _kind(name) in kinds:
            A, B = some.A.new_zeros(some.r, shape[1]), some.B.new_zeros(shape[0], some.r)
            result[name] = Factors(A, B)
    return result


def target_names(names: Iterable[str], model: nn.Module) -> list[str]:
    """`target_modules` for these modules: last parts of names if they match no other module.

    Otherwise they are full names. Servers read only the last part of each.
    """
    wanted = set(names)
    short = sorted({name.rpartition(".")[2] for name in wanted})
    config = LoraConfig(target_modules=short)
    matched = {n for n in _plain_modules(model) if check_target_module_exists(config, n)}
    return short if matched == wanted else sorted(wanted)


def _plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the model without its adapters, by their names in a model without any."""
    modules = {}

    def visit(module: nn.Module, name: str) -> None:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        modules[name] = module
        for child, submodule in module.named_children():
            visit(submodule, f"{name}.{child}" if name else child)

    visit(model, "")
    del modules[""]
    return modules


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)
