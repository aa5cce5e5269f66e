"""The progress bar of a pass, and the memory that it used."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from tqdm.auto import tqdm

from ...layouts import Processes
from ..spec import Calibration


def peak_bytes() -> int:
    """Peak memory so far, in bytes; 0 where the system keeps no count (Windows without CUDA).

    With CUDA it is the memory that torch allocated on the current device since the start of the
    process or the user's last reset; a model on several devices uses more. Without CUDA it is the
    resident memory of the whole process, the interpreter and the model included.
    """
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    if sys.platform == "win32":
        return 0  # no such count there
    import resource  # does not exist on Windows

    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def progress(calibration: Calibration, world: Processes) -> Iterator[Any]:
    """Yield a progress bar of the budget's tokens, on the first process; full when the data end."""
    total, quiet = calibration.token_budget, not calibration.progress or world.rank > 0
    with tqdm(desc="calibration", unit=" tokens", total=total, disable=quiet) as bar:
        yield bar
        bar.total = bar.n
        bar.refresh()
