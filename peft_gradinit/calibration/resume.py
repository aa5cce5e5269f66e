"""The unfinished sums of a pass on disk, so that a killed pass continues to the same result.

Statistics are sums over the data, so the sums and the position in the data are the whole state.
They are saved at the ends of batches, as a whole or not at all, under the fingerprint of what is
measured. Where they cannot be saved, the pass goes on without, with one warning. Another model, other targets, options or data begin anew. Only a pass of one process is
saved: where several share the data, their positions would have to agree.
"""

import dataclasses
import hashlib
import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..errors import warn
from ..files import check_is_file, whole_file
from ..layouts import Processes
from ..statistics import Fingerprint, batch_entries, batches_of, digest
from .replay import Replay

FORMAT = "peft_gradinit.partial/2"
_BATCH = "replay/"
_MAX_SHARE = 0.05
"""Saving takes at most this share of the time, however slow the disk is."""


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a pass keeps its unfinished sums.

    Attributes:
        path: the file; removed when the pass is done.
        data: text that identifies the data, such as their path and how they are read.
        every_seconds: between two saves; 0 saves after every batch. With the default, a killed pass
            loses at most about a minute.
    """

    path: Path
    data: str = ""
    every_seconds: float = 60.0


class Resume:
    """Saves and restores the state of one pass; does nothing without a `Checkpoint`.

    `replay` are the batches kept along the way, which are saved and restored as well.
    """

    def __init__(
        self,
        checkpoint: Checkpoint | None = None,
        fingerprint: Fingerprint | None = None,
        world: Processes | None = None,
        replay: Replay | None = None,
    ) -> None:
        self._replay = replay
        self._checkpoint = checkpoint if world is None or world.size == 1 else None
        self._identity = ""
        if checkpoint is not None and fingerprint is not None:
            text = json.dumps([dataclasses.asdict(fingerprint), checkpoint.data], sort_keys=True)
            self._identity = hashlib.sha256(text.encode()).hexdigest()
        self._last, self._cost = time.perf_counter(), 0.0
        self._has_failed = False

    def load(self) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """The state that an earlier process saved of the same pass; `None` if there is none."""
        if self._checkpoint is None or not self._checkpoint.path.exists():
            return None
        path = self._checkpoint.path
        try:
            check_is_file(path)
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                if (metadata.get("format"), metadata.get("identity")) != (FORMAT, self._identity):
                    warn(
                        f"{str(path)!r} is of another calibration (model, targets, options or data "
                        "differ); this one begins anew."
                    )
                    return None
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            if metadata.pop("sha256", None) != digest(tensors, metadata):
                raise ValueError("its content is not what was written")
            numbers = json.loads(metadata["numbers"])
            if self._replay is not None and "replay" in numbers:
                self._replay.restore(batches_of(tensors, _BATCH), numbers["replay"])
            return tensors, numbers
        except (OSError, SafetensorError, ValueError) as error:
            warn(f"{str(path)!r} cannot be continued ({error}); the calibration begins anew.")
            return None

    def after_batch(self, state: Callable[[], tuple[Mapping[str, Tensor], Mapping]]) -> None:
        """Save the tensors and numbers (as JSON knows them) of `state()`, if it is time to."""
        if self._checkpoint is None or self._has_failed:
            return
        now = time.perf_counter()
        if now - self._last < max(self._checkpoint.every_seconds, self._cost / _MAX_SHARE):
            return
        tensors, numbers = state()
        if self._replay is not None and self._replay.is_storable:
            numbers = {**numbers, "replay": self._replay.facts()}
            tensors = {**tensors, **batch_entries(self._replay.batches, _BATCH)}
        metadata = {"format": FORMAT, "identity": self._identity, "numbers": json.dumps(numbers)}
        own = {key: tensor.detach().cpu().contiguous().clone() for key, tensor in tensors.items()}
        metadata["sha256"] = digest(own, metadata)
        try:
            with whole_file(self._checkpoint.path) as beside:
                save_file(own, beside, metadata=metadata)
        except (OSError, SafetensorError) as error:
            self._has_failed = True
            warn(
                f"the unfinished sums of the calibration cannot be saved ({error}); it goes on, but if "
                "it is killed, it begins anew or from the last sums that were saved."
            )
        self._last = time.perf_counter()
        # With every_seconds=0 it saves after every batch, whatever the cost.
        self._cost = self._last - now if self._checkpoint.every_seconds else 0.0

    def done(self) -> None:
        """Remove the file, once the result is there."""
        if self._checkpoint is None:
            return
        try:
            self._checkpoint.path.unlink(missing_ok=True)
        except OSError as error:
            warn(f"{str(self._checkpoint.path)!r} is no longer needed, but stays ({error}).")
