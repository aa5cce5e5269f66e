r"""Converting adapters whose start wrote into the base to plain LoRA on the untouched base.

PiSSA, OLoRA, CorDA and PEFT's LoRA-GA train `B A` beside `W - s B0 A0`. On the original `W` the
same function is `W + s (B A - B0 A0)`: a LoRA of rank `2r`. The product `s B0 A0` is not in the
trained adapter. It comes from one of three sources:

- the adapter saved right after its start (`initial_update`);
- the original weights (`recomputed_update`), for PiSSA with the full SVD, and for OLoRA. Their
  products do not depend on the signs of singular vectors;
- the overwritten base model, if it was kept (`residual_update`): `W - W_res` has rank `r`.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AdapterError
from ..linalg import Factors, TruncatedSVD, joined, negated, qr, truncated_svd
from ..records import SavedAdapter, same_layers, write_adapter

RESIDUAL_TOLERANCE = 0.05
"""Share of `|W - W_res|` that may lie outside its leading `r` directions: bf16 rounding of `W_res`
gives up to 0.02, another adapter's rank or another model 0.3 and more (measured on PiSSA, r 8)."""

Weight = Callable[[str], Tensor]
"""Function from a layer's name to its weight `(out, in)`, float32."""


@dataclasses.dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        directory: folder of the new adapter.
        ranks: rank of every layer.
        errors: relative error of every layer's update by truncation; 0 without one.
    """

    directory: Path
    ranks: Mapping[str, int]
    errors: Mapping[str, float]


def convert(
    trained: SavedAdapter,
    start: Callable[[str], Factors],
    directory: str | os.PathLike[str],
    *,
    rank: int | None = None,
    overwrite: bool = False,
) -> Converted:
    """Write the trained adapter as plain LoRA on the untouched base; `start` gives `s B0 A0`.

    The default rank is the exact `2r`.
    """
    layers, errors = {}, {}
    for name, update in trained.layers.items():
        layers[name], errors[name] = joined(update, negated(start(name))), 0.0
        if rank is not None and rank < layers[name].r:
            layers[name], errors[name] = layers[name].truncated(rank)
    written = write_adapter(directory, trained, layers, overwrite=overwrite)
    return Converted(written, {n: u.r for n, u in layers.items()}, errors)


def initial_update(trained: SavedAdapter, initial: SavedAdapter) -> Callable[[str], Factors]:
    """`s B0 A0` by layer, from the adapter saved right after its initialisation."""
    if set(same_layers(trained, initial)) != set(trained.layers) | set(initial.layers):
        extra = sorted(set(trained.layers) ^ set(initial.layers))
        raise AdapterError(
            f"{initial.directory!r} is not the start of {trained.directory!r}: only one of them "
            f"adapts {extra[0]}; give the adapter that was saved right after get_peft_model."
        )
    for name, update in initial.layers.items():
        if update.r != trained.layers[name].r:
            raise AdapterError(
                f"{initial.directory!r} is not the start of {trained.directory!r}: {name} has rank "
                f"{update.r} there and {trained.layers[name].r} here; give the adapter that was "
                "saved right after get_peft_model."
            )
    if trained.config.init_lora_weights is False:
        raise AdapterError(
            f"{trained.directory!r} has init_lora_weights=False, which starts from random factors and "
            "leaves the base model as it is: there is nothing to convert."
        )
    _check_orientation(trained)
    return lambda name: initial.layers[name]


def recomputed_update(trained: SavedAdapter, weight: Weight) -> Callable[[str], Factors]:
    """`s B0 A0` by layer, computed again from the original weights."""
    start = trained.overwritten_by
    if start == "pissa":
        return lambda name: _scaled(truncated_svd(weight(name), trained.layers[name].r))
    if start == "olora":
        _check_orientation(trained)
        return lambda name: _leading_qr(weight(name), trained.layers[name].r, trained.scaling(name))
    if start is None:
        raise AdapterError(
            f"{trained.directory!r} has init_lora_weights={trained.config.init_lora_weights!r}, "
            "which leaves the base model as it is: there is nothing to convert. If the base was "
            "overwritten all the same, give the adapter saved right after its start."
        )
    raise AdapterError(
        f"the start init_lora_weights={start!r} of {trained.directory!r} cannot be computed again "
        "from the weights (it is random or depends on data); give the adapter that was saved right "
        "after get_peft_model, or the overwritten base model."
    )


def _check_orientation(trained: SavedAdapter) -> None:
    """Refuse OLoRA on weights that are stored `(in, out)`: PEFT takes them for `(out, in)` ones.

    What it subtracts from them is not the start of the adapter, but that one transposed.

    Raises:
        AdapterError: naming the way that is left.
    """
    if trained.overwritten_by == "olora" and trained.config.fan_in_fan_out:
        raise AdapterError(
            f"{trained.directory!r} was started with init_lora_weights='olora' on layers that store their "
            "weights (in, out), such as Conv1D, where PEFT does not subtract what it starts from; give "
            "the overwritten base model instead (--residual)."
        )


def residual_update(
    trained: SavedAdapter, weight: Weight, residual: Weight
) -> Callable[[str], Factors]:
    """`s B0 A0` by layer, from the original weights minus the overwritten ones (`residual`)."""

    def update(name: str) -> Factors:
        difference = weight(name) - residual(name)
        svd = truncated_svd(difference, trained.layers[name].r)
        whole = torch.linalg.matrix_norm(difference)
        lost = (whole.square() - svd.S.square().sum()).clamp_min(0).sqrt()
        if not lost <= RESIDUAL_TOLERANCE * whole:
            raise AdapterError(
                f"the two base models differ in {name} by a matrix that rank "
                f"{trained.layers[name].r} misses {(lost / whole).item():.0%} of; give the "
                f"original model, and the one that {trained.directory!r} was trained on."
            )
        return _scaled(svd)

    return update


def _scaled(svd: TruncatedSVD) -> Factors:
    return Factors(svd.Vh, svd.U * svd.S)


def _leading_qr(weight: Tensor, r: int, scaling: float) -> Factors:
    Q, R = qr(weight)
    return Factors(R[:r], scaling * Q[:, :r])
