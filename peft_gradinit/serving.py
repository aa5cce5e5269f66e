"""The form of a LoRA adapter that inference servers read: one rank, scale 1, nothing else.

vLLM, SGLang and TGI read `r`, `lora_alpha`, `use_rslora` and `target_modules` of
`adapter_config.json` and apply one scale to all layers; `rank_pattern` and `alpha_pattern` are
ignored. vLLM refuses whatever is not `lora_A` or `lora_B`, and ranks above `--max-lora-rank`. TGI
drops all layers of a kind where one of them is missing. So every layer gets the same rank, padded
with zeros; its scale goes into `B`; and layers that lost their adapter get one that is zero.
"""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer, check_target_module_exists
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from .errors import ExportError
from .linalg import pad_rank, truncate_product
from .tuners import linear_shape

SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)
"""Values of vLLM's `max_lora_rank`."""

PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"

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


@dataclasses.dataclass(frozen=True)
class Layer:
    """One adapted layer.

    Attributes:
        A: `(r, in)`.
        B: `(out, r)`.
        scale: what the product is multiplied by.
        relative_error: of the product, after a truncation.
    """

    A: Tensor
    B: Tensor
    scale: float
    relative_error: float = 0.0

    @property
    def r(self) -> int:
        """The rank of the factors."""
        return self.A.shape[0]

    def truncated(self, rank: int) -> "Layer":
        """The best approximation of at most that rank."""
        product = truncate_product(self.B, self.A, rank)
        return Layer(product.A, product.B, self.scale, product.relative_error)

    def folded(self) -> "Layer":
        """The same layer with its scale in `B`."""
        B = (self.scale * self.B.float()).to(self.B.dtype)
        return Layer(self.A, B, 1.0, self.relative_error)

    def padded(self, rank: int) -> "Layer":
        """The same layer in factors of a larger rank."""
        B, A = pad_rank(self.B, self.A, rank)
        return Layer(A, B, self.scale, self.relative_error)


def linear_layers(
    state_dict: Mapping[str, Tensor], config: LoraConfig
) -> tuple[dict[str, Layer], dict[str, Tensor]]:
    """Sort the entries of a saved adapter.

    Args:
        state_dict: what `get_peft_model_state_dict` gives.
        config: under which they are saved.

    Returns:
        Linear layers by name in the base model, and all other entries.
    """
    names = [
        key.removesuffix(_A).removeprefix(PREFIX)
        for key, tensor in state_dict.items()
        if key.endswith(_A) and tensor.dim() == 2
    ]
    layers = {}
    for name in names:
        A, B = (state_dict[f"{PREFIX}{name}{side}"] for side in (_A, _B))
        layers[name] = Layer(A, B, scaling(config, name, A.shape[0]))
    taken = entries(layers)
    return layers, {key: value for key, value in state_dict.items() if key not in taken}


def scaling(config: LoraConfig, name: str, r: int) -> float:
    """The factor of a layer's product, as PEFT computes it."""
    patterns = config.alpha_pattern or {}
    alpha = patterns.get(get_pattern_key(list(patterns), name), config.lora_alpha)
    return alpha / math.sqrt(r) if config.use_rslora else alpha / r


def entries(layers: Mapping[str, Layer]) -> dict[str, Tensor]:
    """The state dict of some layers."""
    return {
        f"{PREFIX}{name}{side}": factor.contiguous()
        for name, layer in layers.items()
        for side, factor in ((_A, layer.A), (_B, layer.B))
    }


def check_servable(config: LoraConfig, others: Iterable[str]) -> None:
    """Refuse what an inference server cannot hold.

    Args:
        config: of the saved adapter.
        others: keys of entries besides the factors of linear layers.

    Raises:
        ExportError: that lists every reason.
    """
    reasons = [
        f"{name}={value!r} ({reason})"
        for name, reason in _REFUSED.items()
        if (value := getattr(config, name, None)) and value != "none"
    ]
    if keys := sorted(key.removeprefix(PREFIX) for key in others):
        more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
        reasons.append(
            f"the entries {', '.join(keys[:3])}{more} (servers load factors of linear layers only)"
        )
    if reasons:
        raise ExportError(
            f"target='serving' cannot hold this adapter: {'; '.join(reasons)}. Use "
            "target='merged' and serve the merged model, or train without."
        )


def served_rank(layers: Mapping[str, Layer]) -> int:
    """The least rank that servers accept and that all layers fit into.

    Args:
        layers: of the adapter.

    Returns:
        One of `SERVED_RANKS`.

    Raises:
        ExportError: if a layer is larger than all of them.
    """
    largest = max(layers, key=lambda name: layers[name].r)
    for rank in SERVED_RANKS:
        if rank >= layers[largest].r:
            return rank
    raise ExportError(
        f"{largest} has rank {layers[largest].r}, and servers take at most {SERVED_RANKS[-1]}; pass "
        f"rank={SERVED_RANKS[-1]} or less to truncate, or use target='merged'."
    )


def completed(layers: Mapping[str, Layer], model: nn.Module) -> dict[str, Layer]:
    """Add zero layers where a layer of the same kind has no adapter.

    Two layers are of one kind if their names differ in numbers only.

    Args:
        layers: of one rank and scale.
        model: the base model, with its adapters in place.

    Returns:
        The layers in the order of the model.
    """
    some = next(iter(layers.values()))
    kinds, result = {_kind(name) for name in layers}, {}
    for name, module in plain_modules(model).items():
        shape = linear_shape(module)
        if name in layers:
            result[name] = layers[name]
        elif shape is not None and _kind(name) in kinds:
            A, B = some.A.new_zeros(some.r, shape[1]), some.B.new_zeros(shape[0], some.r)
            result[name] = Layer(A, B, some.scale)
    return result


def target_names(names: Iterable[str], model: nn.Module) -> list[str]:
    """Short names that match these modules and no other, or else the full names.

    Args:
        names: full names of the adapted modules.
        model: the base model, with its adapters in place.

    Returns:
        A list for `target_modules`: every server takes the last part of each.
    """
    wanted = set(names)
    short = sorted({name.rpartition(".")[2] for name in wanted})
    config = LoraConfig(target_modules=short)
    matched = {n for n in plain_modules(model) if check_target_module_exists(config, n)}
    return short if matched == wanted else sorted(wanted)


def plain_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules that the model had before any adapter, by their names then."""
    found = {}

    def visit(module: nn.Module, name: str) -> None:
        if isinstance(module, BaseTunerLayer):
            module = module.get_base_layer()
        found[name] = module
        for child, submodule in module.named_children():
            visit(submodule, f"{name}.{child}" if name else child)

    visit(model, "")
    del found[""]
    return found


def _kind(name: str) -> str:
    return re.sub(r"\d+", "*", name)
