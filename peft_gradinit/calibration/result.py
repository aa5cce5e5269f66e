"""`CalibrationResult`: what a pass measured, on its way to the adapter or to a file."""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FingerprintError
from ..linalg import TruncatedSVD
from ..statistics import Fingerprint, Readouts, load_readouts, save_readouts
from .needs import NEEDS, Need, triplets_of
from .replay import Replay

FILE_NAME = "calibration.safetensors"


@dataclasses.dataclass(frozen=True)
class PassFacts:
    """What happened during a pass.

    Attributes:
        n_batches: batches read from the data.
        n_sequences: number of sequences read.
        n_tokens: input tokens, padding not counted; sequences that are not of tokens count as one.
        loss_weight: tokens (or sequences) that carried loss; the denominator of every mean.
        loss: their mean loss; `None` if the pass needs no loss.
        seconds: wall time of the pass, factorisation included.
        state_bytes: what the accumulators held.
        peak_bytes: by how much the memory in use grew at most: on accelerators, over all devices of
            the model, above what was allocated before; on the CPU, of the process's largest so far.
        stopped_by: why it ended: `"end of data"`, `"max_tokens"`, `"max_batches"`, `"settled"`, or
            `"max_sequences"`, the default for sequences that are not of tokens.
    """

    n_batches: int
    n_sequences: int
    n_tokens: int
    loss_weight: float
    loss: float | None
    seconds: float
    state_bytes: int
    peak_bytes: int
    stopped_by: str


@dataclasses.dataclass(frozen=True)
class CalibrationResult:
    """The readouts of every target's statistic, and the model and data they are from.

    Attributes:
        readouts: tensors by module name, then by their own name: `U`, `S` and `Vh` of the leading
            triplets of gradients and inputs, `C` of second moments. Targets that could not be
            measured are absent.
        energy: sum of the squares of all singular values of each target: the squared norm of its
            mean gradient (estimated, for sketches), or the variance of its inputs.
        failures: why a target is absent, by module name.
        fingerprint: model, targets and options; `save` keeps it and a config checks it.
        facts: what happened during the pass.
        need: what was measured, and how much of it a rank uses.
        probe: first sequence of the data, used to measure the drift of the output; not saved.
        replay: batches to measure the loss on again, for methods that take a step; saved if they
            are dicts of tensors.
        options: the calibration without its data: the loss of `probe` and `replay`; not saved.
    """

    readouts: Mapping[str, Readouts]
    energy: Mapping[str, float]
    failures: Mapping[str, str]
    fingerprint: Fingerprint
    facts: PassFacts
    need: Need
    probe: Any = dataclasses.field(default=None, repr=False, compare=False)
    replay: Replay | None = dataclasses.field(default=None, repr=False, compare=False)
    options: Any = dataclasses.field(default=None, repr=False, compare=False)

    @property
    def triplets(self) -> dict[str, TruncatedSVD]:
        """The triplets of the targets whose readouts are triplets, by module name."""
        return {name: triplets_of(parts) for name, parts in self.readouts.items() if "S" in parts}

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result to a file, for `calibration=` in a config made later or elsewhere.

        Args:
            path: a file ending in `.safetensors`, or a folder that gets `calibration.safetensors`.

        Returns:
            The file written.
        """
        path = Path(path)
        if path.suffix != ".safetensors":
            path = path / FILE_NAME
        facts = {
            "energy": dict(self.energy),
            "failures": dict(self.failures),
            "pass": dataclasses.asdict(self.facts),
            "need": dataclasses.asdict(self.need),
        }
        batches = []
        if self.replay is not None and self.replay.is_storable:
            facts["replay"] = self.replay.facts()
            batches = self.replay.batches
        save_readouts(path, self.readouts, self.fingerprint, facts, batches)
        return path

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "CalibrationResult":
        """Read what `save` wrote.

        Args:
            path: the file, or the folder that holds `calibration.safetensors`.

        Returns:
            The result, without its probe.

        Raises:
            FingerprintError: if the file is missing, damaged or of another kind.
        """
        path = Path(path)
        if path.is_dir():
            path = path / FILE_NAME
        readouts, fingerprint, facts, batches = load_readouts(path)
        try:
            passed = PassFacts(**facts["pass"])
            energy, failures = facts["energy"], facts["failures"]
            need = NEEDS[fingerprint.statistic](**facts.get("need", {}))
            replay = Replay(batches, **facts["replay"]) if "replay" in facts else None
        except (KeyError, TypeError) as error:
            raise FingerprintError(
                f"the facts in {str(path)!r} are not those of this version ({error}); recalibrate."
            ) from error
        for name, (out_features, in_features, size) in fingerprint.targets.items():
            parts, shape = readouts.get(name), (out_features, in_features)
            if parts is not None and not need.is_whole(parts, shape, size):
                raise FingerprintError(
                    f"{str(path)!r} is a damaged calibration: {name} should hold "
                    f"{need.shapes(shape, size)}; calibrate and save it again."
                )
        return cls(
            readouts=readouts,
            energy=energy,
            failures=failures,
            fingerprint=fingerprint,
            facts=passed,
            need=need,
            replay=replay,
        )
