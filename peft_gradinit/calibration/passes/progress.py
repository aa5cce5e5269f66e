"""The progress bar of a pass."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm.auto import tqdm

from ...layouts import Processes
from ..feed import Budget, n_batches
from ..spec import Calibration


@contextmanager
def progress(
    calibration: Calibration, budget: Budget, world: Processes
) -> Iterator[Callable[[], None]]:
    """Yield a function that shows how much of what will be read has been read.

    The bar, of the first process, counts tokens, or sequences where the budget is of those.
    """
    quiet, n_data = not calibration.progress or world.rank > 0, n_batches(calibration)
    total = expected(budget, 0, n_data)
    with tqdm(desc="calibration", unit=" tokens", total=total, disable=quiet) as bar:

        def show() -> None:
            in_rows = budget.max_rows is not None and budget.n_rows > 0
            done = budget.n_sequences if in_rows else budget.n_tokens
            bar.unit = " sequences" if in_rows else " tokens"
            bar.total = expected(budget, done, n_data)
            bar.update(done - bar.n)

        yield show
        bar.total = bar.n
        bar.refresh()


def expected(budget: Budget, done: int, n_data: int | None) -> int | None:
    """What will be read by the end: the budget, or less if there are too few batches."""
    own = budget.max_rows if budget.n_rows and budget.max_rows else budget.max_tokens
    limits = [n for n in (budget.max_batches, n_data) if n is not None and budget.n_batches]
    totals = [round(done / budget.n_batches * n) for n in limits]
    totals += [] if own is None else [own]
    return min((max(done, n) for n in totals), default=None)
