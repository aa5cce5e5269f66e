"""What an SVFit adapter is on disk: state-dict arithmetic for its two forms.

The LoRA form is `A = Vh`, `B = U diag(delta)`. The compact form keeps `delta`, a hash of the weight
that the basis is to be computed from again, and a probe: a few numbers that depend on the whole
update, by which a basis that came out differently is noticed.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ..errors import FingerprintError, ShapeError, TargetError
from .svfit_config import SpectralConfig
from .svfit_layer import SVFitLinear

PREFIX = "base_model.model."
_DELTA, _HASH, _PROBE = ".svfit_delta", ".svfit_weight_hash", ".svfit_probe"
_A, _B = ".lora_A.weight", ".lora_B.weight"
_N_PROBES = 8
_PROBE_TOLERANCE = 1e-3
"""Relative; float32 rounding gives 1e-6, a rotated pair of singular vectors 1e-1 and more."""

Parts = tuple[Tensor, Tensor, Tensor]
"""`U (out, r)`, `delta (r,)`, `Vh (r, in)`."""


def live_layers(model: nn.Module, adapter_name: str) -> dict[str, SVFitLinear]:
    """The layers that have an adapter, by name in the base model."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, SVFitLinear) and adapter_name in module.svfit_delta
    }


def lora_form(
    entries: Mapping[str, Tensor], adapter_name: str, factors: Callable[..., tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Turn live entries into those of a plain LoRA.

    Args:
        entries: one adapter's entries of the model's state dict.
        adapter_name: its name, which the keys contain.
        factors: `A, B` from `U, delta, Vh`.

    Returns:
        Entries whose keys contain the adapter's name where PEFT expects it.
    """
    saved = {}
    for stem, (U, delta, Vh) in _parts(entries, adapter_name).items():
        A, B = factors(U, delta, Vh)
        saved[f"{stem}.lora_A.{adapter_name}.weight"] = A
        saved[f"{stem}.lora_B.{adapter_name}.weight"] = B
    return saved


def compact_form(
    entries: Mapping[str, Tensor], adapter_name: str, layers: Mapping[str, SVFitLinear]
) -> dict[str, Tensor]:
    """Turn live entries into `r` numbers a layer and what tells the basis.

    Args:
        entries: one adapter's entries of the model's state dict.
        adapter_name: its name, which the keys contain.
        layers: the live layers, for the hashes of their weights.

    Returns:
        Entries whose keys end in the adapter's name.
    """
    saved = {}
    for stem, parts in _parts(entries, adapter_name).items():
        digest = bytes.fromhex(layers[stem.removeprefix(PREFIX)].weight_hash[adapter_name])
        values = {
            _DELTA: parts[1],
            _HASH: torch.tensor(list(digest), dtype=torch.uint8),
            _PROBE: _probe(parts),
        }
        saved |= {f"{stem}{key}.{adapter_name}": value for key, value in values.items()}
    return saved


def live_form(
    state_dict: Mapping[str, Tensor],
    config: SpectralConfig,
    adapter_name: str,
    layers: Mapping[str, SVFitLinear],
) -> dict[str, Tensor]:
    """Turn a saved adapter of either form into live entries, without adapter names in the keys.

    Args:
        state_dict: what was saved.
        config: the live adapter's config.
        adapter_name: name of the live adapter.
        layers: its layers.

    Returns:
        A new dict; entries of modules trained in full stay as they are.

    Raises:
        TargetError: if the file adapts other layers than the live adapter.
    """
    stems = {key: stem for key in state_dict if (stem := _stem(key)) is not None}
    saved = {stem: key.startswith(PREFIX) for key, stem in stems.items()}
    if saved.keys() != layers.keys():
        raise TargetError(
            "the saved adapter and the live one adapt different layers: only the saved one has "
            f"{sorted(saved.keys() - layers.keys())}, only the live one "
            f"{sorted(layers.keys() - saved.keys())}; use the same target_modules."
        )
    live = {key: value for key, value in state_dict.items() if key not in stems}
    for name, layer in layers.items():
        stem = PREFIX + name if saved[name] else name
        if stem + _A in state_dict:
            parts = _from_lora(state_dict, stem, config, adapter_name, layer)
        else:
            parts = _from_compact(state_dict, stem, adapter_name, layer)
        for key, value in zip(("svfit_U", "svfit_delta", "svfit_Vh"), parts, strict=True):
            live[f"{stem}.{key}"] = value
    return live


def _from_lora(
    state_dict: Mapping[str, Tensor],
    stem: str,
    config: SpectralConfig,
    adapter_name: str,
    layer: SVFitLinear,
) -> Parts:
    U, _, Vh = _live_parts(layer, adapter_name)
    A, B = (state_dict[stem + key].to(U.device) for key in (_A, _B))
    if A.shape != Vh.shape or B.shape != U.shape:
        raise ShapeError(
            f"{stem} has factors of shapes {tuple(A.shape)} and {tuple(B.shape)} in the file, "
            f"expected {tuple(Vh.shape)} and {tuple(U.shape)} for the live rank; load with the "
            "same r, or load the file as plain LoRA with PeftModel.from_pretrained."
        )
    try:
        return config.recover(A, B, (U, Vh), layer.base_matrix())
    except ShapeError as error:
        raise ShapeError(f"{stem}: {error}") from error


def _from_compact(
    state_dict: Mapping[str, Tensor], stem: str, adapter_name: str, layer: SVFitLinear
) -> Parts:
    U, live, Vh = _live_parts(layer, adapter_name)
    delta = state_dict[stem + _DELTA].to(U.device)
    if delta.shape != live.shape:
        raise ShapeError(
            f"{stem} has {delta.numel()} numbers in the file, expected {live.numel()} for the live "
            "rank; load with the same r."
        )
    digest = bytes(state_dict[stem + _HASH].tolist()).hex()
    name, here = f"{stem.removeprefix(PREFIX)}.weight", layer.weight_hash[adapter_name]
    if digest != here:
        raise FingerprintError(
            f"the compact adapter belongs to another base model: {name} has hash {digest} there and "
            f"{here} here; load that base, from whose weights the bases are computed."
        )
    want, got = state_dict[stem + _PROBE].to(U.device), _probe((U, delta, Vh))
    if (got - want).norm() > _PROBE_TOLERANCE * delta.float().norm() * len(want) ** 0.5:
        raise FingerprintError(
            f"the singular vectors of {name} came out differently from those that the compact "
            "adapter was trained with (other library, device or precision, or equal singular "
            "values); load it where it was saved and save it with save_format='lora'."
        )
    return U, delta, Vh


def _live_parts(layer: SVFitLinear, name: str) -> Parts:
    return layer.svfit_U[name].data, layer.svfit_delta[name].data, layer.svfit_Vh[name].data


def _parts(entries: Mapping[str, Tensor], adapter_name: str) -> dict[str, Parts]:
    tail = f"{_DELTA}.{adapter_name}"
    stems = [key.removesuffix(tail) for key in entries if key.endswith(tail)]
    return {
        stem: (
            entries[f"{stem}.svfit_U.{adapter_name}"],
            entries[stem + tail],
            entries[f"{stem}.svfit_Vh.{adapter_name}"],
        )
        for stem in stems
    }


def _stem(key: str) -> str | None:
    """Name of the adapted layer in the base model; `None` if the key is of no adapted layer."""
    for tail in (_A, _B, _DELTA, _HASH, _PROBE):
        if key.endswith(tail):
            return key.removesuffix(tail).removeprefix(PREFIX)
    return None


def _probe(parts: Parts) -> Tensor:
    """Products of the update with fixed random vectors, `(8,)`, each of size `|delta|`."""
    U, delta, Vh = (part.float() for part in parts)
    generator = torch.Generator().manual_seed(0)
    right = torch.randn(Vh.shape[1], generator=generator).to(Vh)
    left = torch.randn(_N_PROBES, U.shape[0], generator=generator).to(U)
    return left @ (U @ (delta * (Vh @ right)))
