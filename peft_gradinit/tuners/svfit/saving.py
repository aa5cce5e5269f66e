"""Saving and loading SVFit adapters: entries of a live adapter from and to their two forms.

The LoRA form is `A = Vh`, `B = U diag(delta)`. The compact form has `delta` and a hash of the
weight, from which the basis is computed again. It also has a probe: a few numbers that depend on
the whole update and tell whether the new basis is the old one.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ...errors import OTHER_DTYPE, FingerprintError, ShapeError, TargetError
from ...records import A_KEY, B_KEY, PREFIX
from ...starts import SpectralConfig
from .layer import SVFitLinear

_DELTA, _HASH, _PROBE = ".svfit_delta", ".svfit_weight_hash", ".svfit_probe"
_N_PROBES = 8
_PROBE_TOLERANCE = 2e-2
"""Relative error allowed: float32 rounding gives 1e-6, that of an adapter cast to bfloat16 4e-3, a
rotated pair of vectors 1e-1 and more."""

Parts = tuple[Tensor, Tensor, Tensor]
"""`U (out, r)`, `delta (r,)`, `Vh (r, in)`."""


def live_layers(model: nn.Module, adapter_name: str) -> dict[str, SVFitLinear]:
    """The layers with an adapter, by name in the model that it was injected into."""
    return {
        name.removeprefix(PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, SVFitLinear) and adapter_name in module.svfit_delta
    }


def lora_form(
    entries: Mapping[str, Tensor], adapter_name: str, factors: Callable[..., tuple[Tensor, Tensor]]
) -> dict[str, Tensor]:
    """Turn live entries into those of a plain LoRA; `factors` gives `A, B` from `U, delta, Vh`.

    The adapter's name stays in the keys.
    """
    saved = {}
    for stem, (U, delta, Vh) in _parts(entries, adapter_name).items():
        A, B = factors(U, delta, Vh)
        saved[f"{_in_base(stem)}.lora_A.{adapter_name}.weight"] = A
        saved[f"{_in_base(stem)}.lora_B.{adapter_name}.weight"] = B
    return saved


def compact_form(
    entries: Mapping[str, Tensor], adapter_name: str, layers: Mapping[str, SVFitLinear]
) -> dict[str, Tensor]:
    """Turn live entries into `delta`, hash and probe of every layer.

    The adapter's name stays in the keys.
    """
    saved = {}
    for stem, parts in _parts(entries, adapter_name).items():
        digest = bytes.fromhex(layers[stem.removeprefix(PREFIX)].weight_hash[adapter_name])
        values = {
            _DELTA: parts[1],
            _HASH: torch.tensor(list(digest), dtype=torch.uint8, device="cpu"),
            _PROBE: _probe(parts),
        }
        saved |= {f"{_in_base(stem)}{key}.{adapter_name}": v for key, v in values.items()}
    return saved


def live_form(
    state_dict: Mapping[str, Tensor],
    config: SpectralConfig,
    adapter_name: str,
    layers: Mapping[str, SVFitLinear],
) -> dict[str, Tensor]:
    """Turn a saved adapter of either form into live entries, without adapter names in the keys.

    Entries of modules trained in full stay as they are.

    Raises:
        TargetError: if the file adapts other layers than the live adapter.
    """
    names = {key: name for key in state_dict if (name := _layer_name(key)) is not None}
    is_prefixed = {name: key.startswith(PREFIX) for key, name in names.items()}
    paths = {_in_base(path): path for path in layers}
    layers = {name: layers[path] for name, path in paths.items()}
    if is_prefixed.keys() != layers.keys():
        raise TargetError(
            "the saved adapter and the live one adapt different layers: only the saved one has "
            f"{sorted(is_prefixed.keys() - layers.keys())}, only the live one "
            f"{sorted(layers.keys() - is_prefixed.keys())}; use the same target_modules."
        )
    live = {key: value for key, value in state_dict.items() if key not in names}
    for name, layer in layers.items():
        stem = PREFIX + name if is_prefixed[name] else name
        if stem + A_KEY in state_dict:
            parts = _from_lora(state_dict, stem, config, adapter_name, layer)
        else:
            parts = _from_compact(state_dict, stem, adapter_name, layer)
        for key, value in zip(("svfit_U", "svfit_delta", "svfit_Vh"), parts, strict=True):
            live[f"{stem.removesuffix(name)}{paths[name]}.{key}"] = value
    return live


def _from_lora(
    state_dict: Mapping[str, Tensor],
    stem: str,
    config: SpectralConfig,
    adapter_name: str,
    layer: SVFitLinear,
) -> Parts:
    U, _, Vh = _live_parts(layer, adapter_name)
    A, B = (state_dict[stem + key].to(U.device) for key in (A_KEY, B_KEY))
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
    for key, size in ((_HASH, len(layer.weight_hash[adapter_name]) // 2), (_PROBE, _N_PROBES)):
        if (shape := tuple(state_dict[stem + key].shape)) != (size,):
            raise ShapeError(
                f"{stem}{key} has shape {shape} in the file, expected {(size,)}; restore the saved "
                "adapter."
            )
    digest = bytes(state_dict[stem + _HASH].to(torch.uint8).tolist()).hex()
    name, here = f"{stem.removeprefix(PREFIX)}.weight", layer.weight_hash[adapter_name]
    if digest != here:
        raise FingerprintError(
            f"the compact adapter belongs to another base model: {name} has hash {digest} there "
            f"and {here} here; load that base, from whose weights the bases are computed. "
            f"{OTHER_DTYPE}"
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


def _in_base(path: str) -> str:
    """Name in the base model of a layer that an adapter of another kind may have been put around."""
    return path.replace(".base_layer", "")


def _layer_name(key: str) -> str | None:
    """Name of an entry's layer in the base model; `None` if the entry is of no adapted layer."""
    for tail in (A_KEY, B_KEY, _DELTA, _HASH, _PROBE):
        if key.endswith(tail):
            return key.removesuffix(tail).removeprefix(PREFIX)
    return None


def _probe(parts: Parts) -> Tensor:
    """`L U diag(delta) Vh x`, `(8,)`, for a fixed random `L` and `x`; each is of size `|delta|`."""
    U, delta, Vh = (part.float() for part in parts)
    generator = torch.Generator().manual_seed(0)
    right = _normal(Vh.shape[1], generator=generator).to(Vh)
    left = _normal(_N_PROBES, U.shape[0], generator=generator).to(U)
    return left @ (U @ (delta * (Vh @ right)))


def _normal(*size: int, generator: torch.Generator) -> Tensor:
    return torch.randn(size, generator=generator, dtype=torch.float32, device="cpu")
