"""How much of the data a pass reads."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ...errors import DataError
from ...layouts import Processes
from ..spec import Calibration


@dataclasses.dataclass
class Step:
    """One sub-batch of the pass.

    Attributes:
        batch: on the model's device.
        n_sequences: its leading dimension.
        n_tokens: its input tokens, padding not counted.
        orient: orient the sketches before adding this sub-batch.
        n_batch: number of its batch, from 1.
        may_be_cut: whether parts of it give the same answer.
        counts: whether it adds anything. If not, it is run only because other processes wait.
        ends_batch: nothing of its batch is left.
    """

    batch: Any
    n_sequences: int
    n_tokens: int
    orient: bool
    n_batch: int = 0
    may_be_cut: bool = True
    counts: bool = True
    ends_batch: bool = True


class Budget:
    """Counts what was read and says why reading ended.

    Attributes:
        n_readers: how many processes read data of their own within the budget.
        orientation: sequences before the next orientation; `None` before the first batch.
        n_resumed: batches that an earlier process has read already.
    """

    n_readers: int = 1

    def __init__(self, calibration: Calibration) -> None:
        self.max_tokens = calibration.token_budget
        self.max_batches = calibration.max_batches
        self.n_tokens = self.n_sequences = self.n_batches = 0
        self.stopped_by = "end of data"
        self.orientation: int | None = None
        self.n_resumed = 0

    def state(self) -> dict[str, Any]:
        """The position in the data, at the end of a batch."""
        names = ("n_tokens", "n_sequences", "n_batches", "orientation")
        return {name: getattr(self, name) for name in names}

    def resume(self, state: Mapping[str, Any]) -> None:
        """Continue from `state()` of an earlier process."""
        for name, value in state.items():
            setattr(self, name, value)
        self.n_resumed = self.n_batches

    def divide(self, n: int) -> None:
        """Keep an equal part of the budget for this process, one of `n` with data of their own."""
        self.n_readers = n
        if self.max_tokens is not None:
            self.max_tokens = -(-self.max_tokens // n)
        if self.max_batches is not None:
            self.max_batches = -(-self.max_batches // n)

    def tokens_spent(self) -> bool:
        """Whether to stop, within a batch or after it; a batch counts as one token at least."""
        if self.max_tokens is None or max(self.n_tokens, self.n_batches - 1) < self.max_tokens:
            return False
        self.stopped_by = "max_tokens"
        return True

    def batches_spent(self) -> bool:
        """Whether to stop after a batch."""
        if self.max_batches is None or self.n_batches < self.max_batches:
            return False
        self.stopped_by = "max_batches"
        return True

    def check_read(self, data: Any) -> None:
        """Refuse data that gave no batch (`DataError`); `data` are for the message."""
        if self.n_sequences == 0:
            raise DataError(
                f"the calibration data ({type(data).__name__}) gave no batch; a generator can be "
                "read only once, and an empty loader has nothing to calibrate on."
            )

    def totals(self, world: Processes) -> dict[str, Any]:
        """What all processes read, and why reading ended: fields of `PassFacts`."""
        read = [self.n_batches, self.n_sequences, self.n_tokens]
        if self.n_readers > 1:
            read = [int(n) for n in world.total(*read)]
        return dict(
            zip(("n_batches", "n_sequences", "n_tokens"), read, strict=True),
            stopped_by=self.stopped_by,
        )

    def take(self, step: Step) -> Step:
        """Count a step."""
        self.n_tokens += step.n_tokens
        self.n_sequences += step.n_sequences
        return step
