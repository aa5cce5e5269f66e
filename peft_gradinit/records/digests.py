"""Digests of a saved adapter's files, by which its `gradinit.json` knows the save it belongs to.

PEFT writes the weights, then `adapter_config.json`, then this package writes `gradinit.json`. A run
that is killed in between leaves files of two saves in one folder.

Some callers write the weights after the config. Then there is no file of weights yet, or that of an
earlier save. So a file gets a digest only if it holds the entries that PEFT took from the adapter
just before.
"""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from torch import Tensor

from ..errors import AdapterError
from ..files import finite
from ..statistics import digest
from .live import AdapterRecord
from .reading import read_dict, read_tensors

_MEANING = (
    *("alora_invocation_tokens", "alpha_pattern", "bias", "exclude_modules", "fan_in_fan_out"),
    *("init_lora_weights", "layer_replication", "layers_pattern", "use_qalora"),
    *("layers_to_transform", "lora_alpha", "lora_bias", "modules_to_save", "peft_type", "r"),
    *("rank_pattern", "target_modules", "target_parameters", "trainable_token_indices"),
    *("use_dora", "use_rslora"),
)
"""Options of `adapter_config.json` that change the function of an adapter or its layers."""


_FACTORS = (".lora_", ".svfit_delta", ".svfit_probe")
"""Parts of the keys of entries that are floating-point numbers."""


def note_entries(record: AdapterRecord | None, entries: Mapping[str, Tensor]) -> None:
    """Remember the entries that PEFT is about to write, by their keys in the file."""
    if record is not None:
        whole = all(type(t) in (Tensor, torch.nn.Parameter) for t in entries.values())
        known = whole and not any(t.is_meta for t in entries.values())
        record.entries = (frozenset(entries), digest(entries)) if known else None


def file_digests(directory: Path, record: AdapterRecord) -> dict[str, str]:
    """Digests of the files just written, by name; empty if the weights are not among them."""
    noted, record.entries = record.entries, None
    path = directory / SAFETENSORS_WEIGHTS_NAME
    if noted is None or not path.is_file():
        return {}
    keys, sum_of_noted = noted
    try:
        tensors = read_tensors(path)
    except SafetensorError:
        return {}
    if not keys <= tensors.keys() or digest({key: tensors[key] for key in keys}) != sum_of_noted:
        return {}
    config = json.loads((directory / CONFIG_NAME).read_text(encoding="utf-8"))
    return {SAFETENSORS_WEIGHTS_NAME: digest(tensors), CONFIG_NAME: _digest_of_config(config)}


def check_digests(
    directory: Path, content: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> None:
    """Refuse files that are not those which `gradinit.json` was written for.

    Args:
        directory: the folder of the adapter.
        content: its `gradinit.json`; earlier versions wrote no digests, and nothing is compared.
        tensors: its weights.

    Raises:
        AdapterError: naming the file.
    """
    digests = content.get("files") or {}
    if not isinstance(digests, dict):
        raise AdapterError(
            f"the gradinit.json of {str(directory)!r} is damaged: files should be a dict of "
            f"digests, got {digests!r}; restore the saved adapter."
        )
    if SAFETENSORS_WEIGHTS_NAME in digests:
        _compare(directory, SAFETENSORS_WEIGHTS_NAME, digests, digest(tensors))
    if CONFIG_NAME in digests:
        config = read_dict(directory / CONFIG_NAME)
        _compare(directory, CONFIG_NAME, digests, _digest_of_config(config))


def check_finite(directory: Path, tensors: Mapping[str, Tensor]) -> None:
    """Refuse weights with a NaN or an infinity, and factors that are integers (`AdapterError`)."""
    for key, tensor in tensors.items():
        if any(part in key for part in _FACTORS) and not tensor.is_floating_point():
            raise AdapterError(
                f"the weights in {str(directory)!r} are damaged: {key} is of {tensor.dtype} where "
                "floating-point numbers are expected; restore the saved adapter."
            )
        value = tensor.float() if tensor.element_size() == 1 else tensor  # float8 has no `isfinite`
        if not value.isfinite().all():
            raise AdapterError(
                f"the weights in {str(directory)!r} are damaged: {key} has values that are not "
                "finite; restore the saved adapter, or load an earlier checkpoint."
            )


def digest_of_facts(content: Mapping[str, Any]) -> str:
    """SHA-256 of a `gradinit.json` without its own digest, by which a changed one is noticed."""
    facts = {name: value for name, value in content.items() if name != "sha256"}
    text = json.dumps(finite(json.loads(json.dumps(facts))), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def meaning(config: Mapping[str, Any]) -> dict[str, Any]:
    """The options of an adapter that change its function, without those that are off."""
    return {name: _ordered(value) for name in _MEANING if (value := config.get(name))}


def _compare(directory: Path, name: str, digests: Mapping[str, str], got: str) -> None:
    if got != digests[name]:
        raise AdapterError(
            f"{str(directory / name)!r} is damaged or of another save than the gradinit.json beside "
            f"it: its SHA-256 is {got[:12]}… where {str(digests[name])[:12]}… is expected. A run "
            "that is killed while it saves leaves such a mixture, and so does another adapter that "
            "PEFT saves over one of this package. Restore the saved adapter or load another "
            "checkpoint; if the other adapter is the one you want, remove the gradinit.json."
        )


def _digest_of_config(config: Mapping[str, Any]) -> str:
    text = json.dumps(meaning(config), sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _ordered(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list | tuple | set) else value
