"""How far the quickstart is, over all its runs."""

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import TrainerCallback

LINES = 10  # of a run that is not on a terminal


class Clock(TrainerCallback):
    """A bar with the time that remains; a line now and then where there is no terminal.

    Args:
        console: where to.
        total: steps of all runs.
    """

    def __init__(self, console: Console, total: int) -> None:
        self.console, self.total, self.done = console, total, 0
        self.stepping = 0.0
        self.begun = 0.0
        self.loss = ""
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        self.bar = Progress(*columns, TimeRemainingColumn(), console=console, transient=True)
        self.task = self.bar.add_task("", total=total)

    def __enter__(self) -> "Clock":
        """Show the bar."""
        if self.console.is_terminal:
            self.bar.start()
        return self

    def __exit__(self, *raised: object) -> None:
        """Hide it."""
        self.bar.stop()

    def say(self, what: str) -> None:
        """What happens now."""
        self.bar.update(self.task, description=what)
        self.console.print(f"{what} …")

    def on_step_begin(self, *ignored: Any, **also: Any) -> None:
        """Start the watch."""
        self.begun = time.perf_counter()

    def on_step_end(self, *ignored: Any, **also: Any) -> None:
        """One more."""
        self.stepping += time.perf_counter() - self.begun
        self.done += 1
        self.bar.update(self.task, advance=1)
        remaining = self.stepping / self.done * (self.total - self.done)
        if not self.console.is_terminal and self.done % max(1, self.total // LINES) == 0:
            self.console.print(
                f"  step {self.done} of {self.total}{self.loss}, about {remaining:.0f} s remain"
            )

    def on_evaluate(self, *ignored: Any, metrics: dict[str, float], **also: Any) -> None:
        """Remember the loss."""
        self.loss = f", validation loss {metrics['eval_loss']:.3f}"
        if self.console.is_terminal:
            self.console.print(f"  step {self.done} of {self.total}{self.loss}")
