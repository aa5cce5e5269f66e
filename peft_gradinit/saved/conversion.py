r"""Adapters whose start wrote into the base model, turned into plain LoRA on the untouched base.

PiSSA, OLoRA, CorDA and PEFT's LoRA-GA train `B A` beside `W - s B0 A0`. On the original `W` the same
function is `W + s (B A - B0 A0)`: a LoRA of rank `2r`. What is needed beside the trained adapter is
the product `s B0 A0`, from one of three sources:

- the adapter as it was saved right after its start (`initial_update`);
- the original weights, for starts that can be computed from them again (`recomputed_update`): PiSSA
  with the full SVD, and OLoRA. Their products do not depend on the signs of singular vectors;
- the overwritten base model, if it was kept (`residual_update`): `W - W_res` has rank `r`.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AdapterError
from ..linalg import Factors, TruncatedSVD, joined, negated, truncated_svd
from .adapters import SavedAdapter, same_layers, write_adapter

RESIDUAL_TOLERANCE = 0.05
"""Share of `|W - W_res|` that may lie outside its leading `r` directions: bf16 rounding of `W_res`
gives up to 0.02, another adapter's rank or another model 0.3 and more (measured on PiSSA, r 8)."""

Weight = Callable[[str], Tensor]
"""The weight `(out, in)`, float32, of a layer by its name."""


@dataclasses.dataclass(frozen=True)
class Converted:
    """What a conversion wrote.

    Attributes:
        directory: the new adapter.
        ranks: rank of every layer.
        errors: what a truncation lost of every layer, relative to its update; 0 without.
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
    """Write the trained adapter as plain LoRA on the untouched base.

    Args:
        trained: the adapter after training.
        start: gives `s B0 A0` of a layer, as of the end of its initialisation.
        directory: of the new adapter.
        rank: truncate every layer to it. Default: keep the exact rank `2r`.
        overwrite: replace a folder that is there.

    Returns:
        Ranks and errors.
    """
    layers, errors = {}, {}
    for name, update in trained.layers.items():
        layers[name], errors[name] = joined(update, negated(start(name))), 0.0
        if rank is not None and rank < layers[name].r:
            layers[name], errors[name] = layers[name].truncated(rank)
    written = write_adapter(directory, trained, layers, overwrite=overwrite)
    return Converted(written, {n: u.r for n, u in layers.items()}, errors)


def initial_update(trained: SavedAdapter, initial: SavedAdapter) -> Callable[[str], Factors]:
    """Take the start from the adapter that was saved before training.

    Args:
        trained: the adapter after training.
        initial: the same adapter, saved right after its initialisation.

    Returns:
        `s B0 A0` by layer.

    Raises:
        AdapterError: if the two do not adapt the same layers.
    """
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
    return lambda name: initial.layers[name]


def recomputed_update(trained: SavedAdapter, weight: Weight) -> Callable[[str], Factors]:
    """Compute the start from the original weights again.

    Args:
        trained: the adapter after training.
        weight: the original weights.

    Returns:
        `s B0 A0` by layer.

    Raises:
        AdapterError: if the start depends on more than the weights.
    """
    start = trained.overwritten_by
    if start == "pissa":
        return lambda name: _scaled(truncated_svd(weight(name), trained.layers[name].r))
    if start == "olora":
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


def residual_update(
    trained: SavedAdapter, weight: Weight, residual: Weight
) -> Callable[[str], Factors]:
    """Take the start as the difference between the original and the overwritten weights.

    Args:
        trained: the adapter after training.
        weight: the original weights.
        residual: the overwritten ones, `W - s B0 A0`.

    Returns:
        `s B0 A0` by layer.
    """

    def of(name: str) -> Factors:
        difference = weight(name) - residual(name)
        svd = truncated_svd(difference, trained.layers[name].r)
        whole = torch.linalg.matrix_norm(difference)
        lost = (whole.square() - svd.S.square().sum()).clamp_min(0).sqrt()
        if not lost <= RESIDUAL_TOLERANCE * whole:
            raise AdapterError(
                f"the two base models differ in {name} by a matrix of which rank "
                f"{trained.layers[name].r} leaves {(lost / whole).item():.0%}; give the original "
                f"model, and the one that {trained.directory!r} was trained on."
            )
        return _scaled(svd)

    return of


def _scaled(svd: TruncatedSVD) -> Factors:
    return Factors(svd.Vh, svd.U * svd.S)


def _leading_qr(weight: Tensor, r: int, scaling: float) -> Factors:
    Q, R = torch.linalg.qr(weight)
    return Factors(R[:r], scaling * Q[:, :r])
