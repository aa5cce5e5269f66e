"""How much of the data a pass reads."""

import dataclasses
from typing import Any

from ..errors import DataError
from .spec import Calibration


@dataclasses.dataclass
class Step:
    """One sub-batch of the pass.

    Attributes:
        batch: on the model's device.
        n_sequences: its leading dimension.
        n_tokens: its input tokens, padding not counted.
        orient: orient the sketches before adding this sub-batch.
        ends_batch: nothing of its batch is left.
    """

    batch: Any
    n_sequences: int
    n_tokens: int
    orient: bool
    ends_batch: bool = True


FIRST_ORIENTATION = 8
"""Sequences before the first orientation of the sketches; the next come after 3, 9, … times as many.

An eighth and three eighths of a 64-sequence calibration: on MiniLM as good as four orientations.
"""


class Budget:
    """Counts what was read and says why reading ended.

    Attributes:
        orientation: sequences before the next orientation of the sketches.
        n_resumed: batches that another process has read already.
    """

    def __init__(self, calibration: Calibration) -> None:
        self.max_tokens = calibration.token_budget
        self.max_batches = calibration.max_batches
        self.n_tokens = self.n_sequences = self.n_batches = 0
        self.stopped_by = "end of data"
        self.orientation, self.n_resumed = FIRST_ORIENTATION, 0

    def state(self) -> dict[str, int]:
        """The position in the data, at the end of a batch."""
        names = ("n_tokens", "n_sequences", "n_batches", "orientation")
        return {name: getattr(self, name) for name in names}

    def resume(self, state: dict[str, int]) -> None:
        """Continue from `state()` of another process."""
        for name, value in state.items():
            setattr(self, name, value)
        self.n_resumed = self.n_batches

    def tokens_spent(self) -> bool:
        """Whether to stop, within a batch or after it; batches of no tokens end as well."""
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
        """Refuse data that gave nothing.

        Args:
            data: what was read, for the message.

        Raises:
            DataError: if no batch was counted.
        """
        if self.n_sequences == 0:
            raise DataError(
                f"the calibration data ({type(data).__name__}) gave no batch; a generator can be "
                "read only once, and an empty loader has nothing to calibrate on."
            )

    def take(self, step: Step) -> Step:
        """Count a step."""
        self.n_tokens += step.n_tokens
        self.n_sequences += step.n_sequences
        return step
