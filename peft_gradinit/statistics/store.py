"""The file that keeps what a pass measured: safetensors, with a fingerprint of where it is from.

One file holds, for every target, what was read off its statistic: named tensors, such as the `U`,
`S` and `Vh` of its leading triplets. The fingerprint names the model (a hash of every base weight),
the targets with their shapes and ranks, and the options that shaped the measurement; a file with
another fingerprint is refused, with both values in the message. Nothing is pickled.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import OTHER_DTYPE, FingerprintError
from ..files import check_is_file, whole_file

FORMAT = "peft_gradinit.calibration/2"
_READ = ("peft_gradinit.calibration/1", FORMAT)
"""Formats that are read. Version 1 holds `U`, `S` and `Vh` of every target under the same names."""

_TOLERANCE = 1e-2
"""Relative error of triplets that are not damaged; half precision needs about that."""

Readouts = Mapping[str, Tensor]
"""Tensors that were read off the statistic of one layer, by name; names contain no dot."""
_BATCH = "batch/"
"""Starts the names of tensors that belong to batches; no module's name has a slash."""


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a measurement depends on.

    Attributes:
        statistic: what was measured, such as `"gradient"`.
        weights: hash of every base weight by parameter name, see `layouts.hash_weight`.
        targets: `[out, in, rank]` by module name.
        options: options that shaped the measurement, by name.
    """

    statistic: str
    weights: Mapping[str, str]
    targets: Mapping[str, list[int]]
    options: Mapping[str, Any]

    def __post_init__(self) -> None:
        for name in ("weights", "targets", "options"):
            if not isinstance(value := getattr(self, name), Mapping):
                raise TypeError(f"{name} of a fingerprint must be a mapping, got {value!r}")

    def check(self, expected: "Fingerprint") -> None:
        """Refuse to serve a caller who expects something else.

        Only the options that `expected` names are compared.

        Raises:
            FingerprintError: naming the first difference with both values.
        """
        if self.statistic != expected.statistic:
            raise FingerprintError(
                f"the calibration holds the statistic {self.statistic!r} but the method needs "
                f"{expected.statistic!r}; calibrate for this method."
            )
        for name, want in expected.options.items():
            if (got := self.options.get(name)) != want:
                raise FingerprintError(
                    f"the calibration was made with {name}={got!r} but {name}={want!r} is asked "
                    "for; recalibrate, or pass the calibration without that option."
                )
        _compare("target", self.targets, expected.targets, "[out, in, rank]")
        _compare("model weight", self.weights, expected.weights, "hash")


def save_readouts(
    path: str | os.PathLike[str],
    readouts: Mapping[str, Readouts],
    fingerprint: Fingerprint,
    facts: Mapping[str, Any],
    batches: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Write readouts, fingerprint and facts; an interrupted write leaves the old file in place.

    Args:
        path: the file, conventionally `*.safetensors`; missing folders are made.
        readouts: by module name, then by their own name.
        fingerprint: where they are from.
        facts: anything else to remember, as JSON.
        batches: batches of the data to keep as well.
    """
    tensors = {f"{name}.{part}": t for name, parts in readouts.items() for part, t in parts.items()}
    # Layers that are given the same inputs share what was measured, which is written once.
    first = {id(tensor): key for key, tensor in reversed(tensors.items())}
    same = {key: first[id(t)] for key, t in tensors.items() if first[id(t)] != key}
    distinct = {key: t for key, t in tensors.items() if key not in same}
    distinct |= batch_entries(batches, _BATCH)
    # Cloned: tensors may share memory, which safetensors refuses.
    own = {key: t.detach().cpu().contiguous().clone() for key, t in distinct.items()}
    metadata = {
        "format": FORMAT,
        "same": json.dumps(same, sort_keys=True),
        "fingerprint": json.dumps(dataclasses.asdict(fingerprint), sort_keys=True),
        "facts": json.dumps(facts, sort_keys=True),
    }
    metadata["sha256"] = digest(own, metadata)
    with whole_file(path) as beside:
        save_file(own, beside, metadata=metadata)


def load_readouts(
    path: str | os.PathLike[str],
) -> tuple[dict[str, dict[str, Tensor]], Fingerprint, dict[str, Any], list[dict[str, Tensor]]]:
    """Read what `save_readouts` wrote: readouts by module name, fingerprint, facts and batches.

    Raises:
        FingerprintError: if the file is missing, damaged, or was not written by `save_readouts`.
    """
    tensors, metadata = _checked_content(path)
    try:
        fingerprint = Fingerprint(**json.loads(metadata["fingerprint"]))
        same = json.loads(metadata.get("same", "{}"))
        readouts: dict[str, dict[str, Tensor]] = {}
        tensors |= {key: tensors[first] for key, first in same.items()}
        for key, tensor in tensors.items():
            name, _, part = key.rpartition(".")
            if name in fingerprint.targets:
                readouts.setdefault(name, {})[part] = tensor
        ordered = {name: readouts[name] for name in fingerprint.targets if name in readouts}
        facts, batches = json.loads(metadata["facts"]), batches_of(tensors, _BATCH)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise FingerprintError(
            f"{str(path)!r} is a damaged calibration: {error!r}; calibrate and save it again."
        ) from error
    if metadata["format"] != FORMAT:
        _check_triplets(path, ordered)
    return ordered, fingerprint, facts, batches


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> str:
    """SHA-256 of tensors and metadata, so that a flipped bit is noticed."""
    hashed = hashlib.sha256(json.dumps(sorted((metadata or {}).items())).encode())
    for key in sorted(tensors):
        tensor = tensors[key].detach().cpu().contiguous()
        hashed.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        hashed.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return hashed.hexdigest()


def _checked_content(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a calibration, as they were written."""
    try:
        check_is_file(path)
        tensors, metadata = _read(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise FingerprintError(
            f"cannot read a calibration from {str(path)!r}: {error}; pass the file that "
            "`CalibrationResult.save` wrote."
        ) from error
    if metadata.get("format") not in _READ:
        raise FingerprintError(
            f"{str(path)!r} is a safetensors file but not a calibration: expected format "
            f"{FORMAT!r}, got {metadata.get('format')!r}; pass the file that "
            "`CalibrationResult.save` wrote."
        )
    stored = metadata.pop("sha256", None)
    has_digest = stored is not None or metadata["format"] == FORMAT  # format 1 has none
    if has_digest and stored != digest(tensors, metadata):
        raise FingerprintError(
            f"{str(path)!r} is a damaged calibration: its content is not what was written (another "
            "SHA-256); calibrate and save it again."
        )
    return tensors, metadata


def _read(path: str | os.PathLike[str]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of one file, also while other processes save to its path.

    safetensors opens a path twice, and a save in between puts another file there.

    Raises:
        SafetensorError: if it is no whole safetensors file.
    """
    while True:
        before = _identity(path)
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                content = tensors, file.metadata() or {}
        except SafetensorError:
            if before == _identity(path):
                raise
            continue
        if before == _identity(path):
            return content


def _identity(path: str | os.PathLike[str]) -> tuple[int, int]:
    status = Path(path).stat()
    return status.st_ino, status.st_mtime_ns


def _check_triplets(path: str | os.PathLike[str], readouts: Mapping[str, Readouts]) -> None:
    """Refuse readouts of format 1, which has no digest, that are no singular triplets."""
    for name, parts in readouts.items():
        for part, tensor in parts.items():
            if part in ("U", "S", "Vh") and (got := _fault_of(part, tensor)):
                raise FingerprintError(
                    f"{str(path)!r} is a damaged calibration: {name} should hold singular triplets, "
                    f"but its {part} {got}; calibrate and save it again."
                )


def _fault_of(part: str, tensor: Tensor) -> str | None:
    """What excludes that a tensor is a part of singular triplets; `None` if nothing does."""
    if not tensor.is_floating_point() or tensor.dim() != (1 if part == "S" else 2):
        return f"is {tensor.dtype} of shape {tuple(tensor.shape)}"
    values = tensor.float()
    if not values.isfinite().all():
        return "has values that are not finite"
    if part == "S":
        is_ordered = (values >= 0).all() and (values.diff() <= _TOLERANCE * values.max()).all()
        return None if is_ordered else "is not descending to 0 or more"
    rows = values.T if part == "U" else values
    if rows.shape[1] == 0:
        return None  # inputs have no `U`
    identity = torch.eye(len(rows), dtype=rows.dtype, device=rows.device)
    error = (rows @ rows.T - identity).abs().max() if len(rows) else 0
    return None if error < _TOLERANCE else f"is not orthonormal (error {error:.1g})"


def batch_entries(batches: Sequence[Mapping[str, Tensor]], prefix: str) -> dict[str, Tensor]:
    """The tensors of batches, under the names `<prefix><number of the batch>/<key>`."""
    entries: dict[str, Tensor] = {}
    for i, batch in enumerate(batches):
        entries |= {f"{prefix}{i}/{key}": value for key, value in batch.items()}
    return entries


def batches_of(entries: Mapping[str, Tensor], prefix: str) -> list[dict[str, Tensor]]:
    """The batches that `batch_entries` has named, in order; other entries are ignored."""
    batches: dict[int, dict[str, Tensor]] = {}
    for name, tensor in entries.items():
        if name.startswith(prefix):
            i, _, key = name.removeprefix(prefix).partition("/")
            batches.setdefault(int(i), {})[key] = tensor
    return [batches[i] for i in sorted(batches)]


def _compare(what: str, stored: Mapping[str, Any], expected: Mapping[str, Any], unit: str) -> None:
    for name in sorted(stored.keys() | expected.keys()):
        got, want = stored.get(name), expected.get(name)
        if got != want:
            dtype = f" {OTHER_DTYPE}" if unit == "hash" and got and want else ""
            raise FingerprintError(
                f"the calibration is of another {what}: {name} has {unit} {got} in the "
                f"calibration and {want} here; recalibrate on this model with these targets.{dtype}"
            )
