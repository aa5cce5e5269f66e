"""The file that keeps what a pass measured: safetensors, with a fingerprint of where it is from.

One file holds, for every target, the leading triplets of its statistic and their numbers. The
fingerprint names the model (a hash of every base weight), the targets with their shapes and ranks,
and the options that shaped the measurement; a file with another fingerprint is refused, with both
values in the message. Nothing is pickled.
"""

import dataclasses
import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import FingerprintError
from ..files import whole_file
from ..linalg import TruncatedSVD

FORMAT = "peft_gradinit.calibration/1"
_PARTS = ("U", "S", "Vh")
_BATCH = "batch/"
"""Starts the names of tensors that belong to batches; no module's name has a slash."""


@dataclasses.dataclass(frozen=True)
class Fingerprint:
    """What a measurement depends on.

    Attributes:
        statistic: what was measured, such as `"gradient"`.
        weights: hash of every base weight by parameter name, see `hash_weight`.
        targets: `[out, in, rank]` by module name.
        options: options that shaped the measurement, by name.
    """

    statistic: str
    weights: Mapping[str, str]
    targets: Mapping[str, list[int]]
    options: Mapping[str, Any]

    def check(self, expected: "Fingerprint") -> None:
        """Refuse to serve a caller who expects something else.

        Args:
            expected: the caller's fingerprint; only the options that it names are compared.

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


def hash_weight(weight: Tensor) -> str:
    """Hash a sample of a tensor, equal for float32 weights and for their bfloat16 copy.

    Takes up to 4,096 evenly spaced entries, so that a large model is read in no time; floating
    entries are rounded to bfloat16 first.

    Args:
        weight: any tensor; quantised storage is hashed as it is.

    Returns:
        16 hexadecimal digits.
    """
    flat = weight.detach().reshape(-1)
    step = -(-flat.numel() // 4096) | 1  # odd, so that it walks through the columns as well
    flat = flat[::step].cpu()
    if flat.is_floating_point():
        flat = flat.to(torch.bfloat16).view(torch.int16)
    digest = hashlib.sha256(flat.contiguous().numpy().tobytes())
    digest.update(str(tuple(weight.shape)).encode())
    return digest.hexdigest()[:16]


def save_triplets(
    path: str | os.PathLike[str],
    triplets: Mapping[str, TruncatedSVD],
    fingerprint: Fingerprint,
    facts: Mapping[str, Any],
    batches: Sequence[Mapping[str, Tensor]] = (),
) -> None:
    """Write triplets, fingerprint and facts; an interrupted write leaves the old file in place.

    Args:
        path: the file, conventionally `*.safetensors`; missing folders are made.
        triplets: by module name.
        fingerprint: where they are from.
        facts: anything else to remember, as JSON.
        batches: batches of the data to keep as well.
    """
    tensors = {
        f"{name}.{part}": getattr(svd, part).detach().cpu().contiguous().clone()  # may be shared
        for name, svd in triplets.items()
        for part in _PARTS
    }
    for i, batch in enumerate(batches):
        for key, value in batch.items():
            tensors[f"{_BATCH}{i}/{key}"] = value.detach().cpu().contiguous().clone()
    metadata = {
        "format": FORMAT,
        "fingerprint": json.dumps(dataclasses.asdict(fingerprint), sort_keys=True),
        "facts": json.dumps(facts, sort_keys=True),
    }
    with whole_file(path) as beside:
        save_file(tensors, beside, metadata=metadata)


def load_triplets(
    path: str | os.PathLike[str],
) -> tuple[dict[str, TruncatedSVD], Fingerprint, dict[str, Any]]:
    """Read what `save_triplets` wrote.

    Args:
        path: the file.

    Returns:
        Triplets by module name, their fingerprint, and the facts.

    Raises:
        FingerprintError: if the file is missing, damaged, or was not written by `save_triplets`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            names = [key for key in file.keys() if not key.startswith(_BATCH)]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
    except (OSError, SafetensorError) as error:
        raise FingerprintError(
            f"cannot read a calibration from {str(path)!r}: {error}; pass the file that "
            "`CalibrationResult.save` wrote."
        ) from error
    if metadata.get("format") != FORMAT:
        raise FingerprintError(
            f"{str(path)!r} is a safetensors file but not a calibration: expected format "
            f"{FORMAT!r}, got {metadata.get('format')!r}; pass the file that "
            "`CalibrationResult.save` wrote."
        )
    try:
        fingerprint = Fingerprint(**json.loads(metadata["fingerprint"]))
        triplets = {
            name: TruncatedSVD(*(tensors[f"{name}.{part}"] for part in _PARTS))
            for name in fingerprint.targets
            if f"{name}.U" in tensors
        }
        return triplets, fingerprint, json.loads(metadata["facts"])
    except (KeyError, TypeError, ValueError) as error:
        raise FingerprintError(
            f"{str(path)!r} is a damaged calibration: {error!r}; calibrate and save it again."
        ) from error


def load_batches(path: str | os.PathLike[str]) -> list[dict[str, Tensor]]:
    """Read the batches that `save_triplets` kept.

    Args:
        path: a file that `load_triplets` accepts.

    Returns:
        The batches in order; empty if none were kept.
    """
    batches: dict[int, dict[str, Tensor]] = {}
    with safe_open(path, framework="pt") as file:
        for name in file.keys():  # noqa: SIM118
            if name.startswith(_BATCH):
                _, index, key = name.split("/", 2)
                batches.setdefault(int(index), {})[key] = file.get_tensor(name)
    return [batches[i] for i in sorted(batches)]


def _compare(what: str, stored: Mapping[str, Any], expected: Mapping[str, Any], unit: str) -> None:
    for name in sorted(stored.keys() | expected.keys()):
        got, want = stored.get(name), expected.get(name)
        if got != want:
            raise FingerprintError(
                f"the calibration is of another {what}: {name} has {unit} {got} in the "
                f"calibration and {want} here; recalibrate on this model with these targets."
            )
