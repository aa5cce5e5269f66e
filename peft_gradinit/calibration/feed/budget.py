"""How much of the data a pass reads."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate, islice
from typing import Any

from ...errors import DataError, warn
from ...layouts import Processes
from ..spec import Calibration
from .tokens import has_tokens, n_input_tokens

FEW_SEQUENCES = 8
"""Fewer are a reason to warn."""


@dataclasses.dataclass
class Step:
    """One sub-batch of the pass.

    Attributes:
        batch: on the model's device.
        n_sequences: its leading dimension.
        n_tokens: its input tokens, padding not counted.
        orient: orient the sketches before adding this sub-batch.
        of_tokens: whether its rows are of tokens, not audio clips, images or series.
        n_batch: number of its batch, from 1.
        may_be_cut: whether parts of it give the same answer.
        counts: whether it adds anything. If not, it is run only because other processes wait.
        ends_batch: nothing of its batch is left.
    """

    batch: Any
    n_sequences: int
    n_tokens: int
    orient: bool
    of_tokens: bool = True
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
        n_rows: sequences that are not of tokens.
        may_have_more: whether the data were not at their end when the budget was.
    """

    n_readers: int = 1

    def __init__(self, calibration: Calibration) -> None:
        self.max_tokens = calibration.token_budget
        self.max_batches = calibration.max_batches
        self.max_rows = calibration.sequence_budget
        self.n_tokens = self.n_sequences = self.n_batches = self.n_rows = 0
        self.may_have_more = False
        self.stopped_by = "end of data"
        self.orientation: int | None = None
        self.n_resumed = 0

    def state(self) -> dict[str, Any]:
        """The position in the data, at the end of a batch."""
        names = ("n_tokens", "n_sequences", "n_batches", "n_rows", "orientation")
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
        if self.max_rows is not None:
            self.max_rows = -(-self.max_rows // n)

    def tokens_spent(self) -> bool:
        """Whether to stop, within a batch or after it; a batch counts as one token at least."""
        if self.max_rows is not None and self.n_rows >= self.max_rows:
            self.stopped_by = "max_sequences"
            return True
        if self.max_tokens is None or max(self.n_tokens, self.n_batches - 1) < self.max_tokens:
            return False
        self.stopped_by = "max_tokens"
        return True

    def room(self, tokens: Sequence[int], *, of_tokens: bool) -> int:
        """How many of some sequences, given the tokens of each, the budget still has room for."""
        room = len(tokens)
        if self.max_tokens is not None:
            before = accumulate(tokens, initial=self.n_tokens)
            room = sum(n < self.max_tokens for n in islice(before, len(tokens)))
        if self.max_rows is not None and not of_tokens:
            room = min(room, self.max_rows - self.n_rows)
        return max(1, room)

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

    def check_enough(self, n_sequences: int) -> None:
        """Warn if the default budget left most of the data unread.

        `n_sequences` are those of all processes. A budget that the user gave is no surprise.
        """
        is_default = self.max_rows is not None
        if is_default and self.may_have_more and n_sequences < FEW_SEQUENCES:
            warn(
                f"the calibration read only {n_sequences} sequences before the default "
                "budget ended it, although the data hold more; pass max_batches or a "
                "larger max_tokens, or shorter sequences."
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
        self.n_rows += 0 if step.of_tokens else step.n_sequences
        return step


def lengths_within(calibration: Calibration, sequences: Iterable[Any]) -> Iterator[int]:
    """Tokens of the sequences that a pass over samples would read.

    Args:
        calibration: whose budget ends it.
        sequences: batches of one sample; no more are taken than the budget has room for.

    Yields:
        The tokens of each; 1 if it is not of tokens.
    """
    budget = Budget(calibration)
    for i, batch in enumerate(sequences, start=1):
        n_tokens, of_tokens = n_input_tokens(batch), has_tokens(batch)
        budget.take(Step(batch, 1, n_tokens, orient=False, of_tokens=of_tokens))
        yield n_tokens
        budget.n_batches = i // calibration.batch_size
        if budget.tokens_spent() or budget.batches_spent():
            return
