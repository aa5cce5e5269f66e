"""What a run shows while it trains: a line on standard error for every logged loss, and a bar."""

import sys
import time
from typing import Any

from tqdm import tqdm
from transformers import TrainerCallback
from transformers.trainer_callback import ProgressCallback


class Losses(TrainerCallback):
    """Prints step, loss and the minutes that remain; standard output is left to results."""

    def __init__(self) -> None:
        self._begun: float | None = None
        self._first = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, **also: Any) -> None:
        """Start the watch at the first step, after a calibration; a resumed run begins at its step."""
        if self._begun is None:
            self._begun, self._first = time.perf_counter(), state.global_step

    def on_log(
        self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **also: Any
    ) -> None:
        """Print a training loss, or that of the evaluation rows."""
        found = {n: v for n, v in (logs or {}).items() if n in ("loss", "eval_loss")}
        if not found or not state.is_world_process_zero:
            return
        name, loss = next(iter(found.items()))
        done, left = state.global_step - self._first, state.max_steps - state.global_step
        passed = time.perf_counter() - (self._begun or time.perf_counter())
        minutes = passed / 60 * left / max(1, done)
        remaining = f", about {minutes:.1f} minutes remain" if left and name == "loss" else ""
        words = name.replace("eval_", "evaluation ")
        tqdm.write(  # above a bar, if there is one
            f"step {state.global_step} of {state.max_steps}: {words} {loss:.4f}{remaining}",
            file=sys.stderr,
        )


class Bar(ProgressCallback):
    """The trainer's bar, without its logs, which it prints to standard output."""

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Nothing: `Losses` prints them."""
