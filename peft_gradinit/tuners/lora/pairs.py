"""The pairs of a live adapter: `A`, `B` and the anchor of every adapted layer.

PEFT wraps a module once for each of its targeted parameters and keeps the factors of all experts in
one pair. `lora_A (experts * r, in)` has them expert by expert. In `lora_B (out, r * experts)` the
columns of all experts for one rank are next to each other.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ...layouts import plain_name, unwrapped, whole
from ...records import PREFIX, record_of
from ...starts import Target, targets_of
from .deferred import is_deferred

Factors = tuple[Tensor, Tensor]


@dataclasses.dataclass(frozen=True)
class Pair:
    """The trainable factors of one adapted layer, or of one parameter with all its experts.

    Attributes:
        name: full name of the module or parameter in the base model.
        layer: PEFT's LoRA layer.
        adapter_name: name of the adapter.
        A: the trainable parameter, `(r, in)`; for `n` experts `(n r, in)`.
        B: the trainable parameter, `(out, r)`; for `n` experts `(out, r n)`.
        anchor: `A0` and `B0` in the same layout, whose product is subtracted from the function;
            `None` for methods without an anchor.
        n_experts: number of matrices that the factors are for; 1 for layers.
    """

    name: str
    layer: LoraLayer
    adapter_name: str
    A: nn.Parameter
    B: nn.Parameter
    anchor: Factors | None
    n_experts: int

    @property
    def r(self) -> int:
        """Rank of each matrix."""
        return self.layer.r[self.adapter_name]

    @property
    def scaling(self) -> float:
        """What the product `B A` is multiplied by."""
        return self.layer.scaling[self.adapter_name]

    def matrices(self) -> list[Factors]:
        """`A (r, in)` and `B (out, r)` of every expert, as views of the parameters.

        A layer without experts gives one pair.
        """
        return _by_expert(self.A, self.B, self.n_experts)

    def anchors(self) -> list[Factors]:
        """`A0 (r, in)` and `B0 (out, r)` of every expert; empty without an anchor."""
        return _by_expert(*self.anchor, self.n_experts) if self.anchor else []


def pairs(model: nn.Module, adapter_name: str = "default") -> Iterator[Pair]:
    """The pairs of an adapter of this package, or of a plain LoRA of PEFT.

    Embeddings and convolutions have no pair: their factors are no matrices that multiply inputs.

    Args:
        model: a `PeftModel`, or a base model with adapters in it.
        adapter_name: which adapter.

    Yields:
        A pair for every adapted linear layer and parameter, in the order of the model.
    """
    for name, layer in adapted_layers(model, adapter_name):
        if adapter_name not in layer.lora_A:
            continue
        sides: list[Any] = [unwrapped(f[adapter_name]) for f in (layer.lora_A, layer.lora_B)]
        if not isinstance(sides[0], nn.Linear):
            continue
        anchored = parametrize.is_parametrized(sides[0], "weight")
        A, B = (s.parametrizations.weight.original if anchored else s.weight for s in sides)
        anchor = None
        if anchored:
            first, second = (side.parametrizations.weight[0].anchor for side in sides)
            anchor = (first, -second)
        yield Pair(name, layer, adapter_name, A, B, anchor, n_experts(layer))


def adapted_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, Any]]:
    """PEFT's LoRA layers with an adapter, after the names of their modules or parameters."""
    for path, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.r:
            name = plain_name(path).removeprefix(PREFIX)
            if isinstance(layer, ParamWrapper):
                name = f"{name.replace('.base_layer', '')}.{layer.parameter_name}"
            yield name, layer


def live_targets(model: nn.Module, adapter_name: str) -> dict[str, Target]:
    """The targets of an injected adapter by name, with the ranks of the layers."""
    record = record_of(model, adapter_name)
    requested = record.requested_ranks if record else {}
    targets = {}
    for name, layer in adapted_layers(model, adapter_name):
        r, alpha = layer.r[adapter_name], layer.lora_alpha[adapter_name]
        ranks: Any = (r, requested.get(name, r), alpha)
        parameter = getattr(layer, "parameter_name", None)
        waits = is_deferred(layer, adapter_name)  # layers that start plain do not
        found = partial(_fixed, ranks), partial(_fixed, waits)
        targets |= targets_of(name, layer, parameter, *found)
    return targets


def _fixed(value: Any, shape: object) -> Any:
    del shape
    return value


def n_experts(layer: Any) -> int:
    """Number of matrices that the factors of a LoRA layer are for."""
    return layer.num_experts if isinstance(layer, ParamWrapper) else 1


def stacked(factors: Mapping[int, Factors], pair: Pair) -> Factors:
    """`A0 (n * r, in)` and `B0 (out, r * n)` from the starts `A0 (r, in)`, `B0 (out, r)` by expert.

    Experts without a start keep the pair's `A` and get `B = 0`.
    """
    if pair.n_experts == 1:
        return factors[0]
    A = whole(pair.A).detach().float().unflatten(0, (pair.n_experts, -1)).clone()
    B = torch.zeros_like(whole(pair.B), dtype=torch.float32).unflatten(1, (-1, pair.n_experts))
    for expert, (A0, B0) in factors.items():
        A[expert], B[:, :, expert] = A0, B0
    return A.flatten(0, 1), B.flatten(1, 2)


def _by_expert(A: Tensor, B: Tensor, n: int) -> list[Factors]:
    by_expert = B.unflatten(1, (-1, n)).unbind(2)
    return list(zip(A.unflatten(0, (n, -1)).unbind(0), by_expert, strict=True))
