"""A study: the runs that its plan asks for, on disk, made by several processes."""

import functools
import itertools
import json
import math
import multiprocessing
import warnings
from collections.abc import Iterable
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from peft_gradinit.files import write_json

from .methods import METHODS
from .plan import SEEDS, best_rate, next_rates
from .settings import load_settings
from .tasks import TASKS, Task
from .training import Key, run

BASELINE = "lora"
HORIZONS = (0.4, 0.6, 0.8)
"""Shorter runs of our types and of the baseline, with a schedule of their own: what a user would do
who is in a hurry."""


class Study:
    """Results of one task, by method.

    Args:
        folder: of all results; those of other settings lie beside these.
        task: name of the task, or path of its file.
    """

    def __init__(self, folder: Path, task: str):
        self.task = task
        self.settings = load_settings(task)
        self.folder = folder / self.settings.task / self.settings.key
        self.steps = self.settings.training.steps

    def path_of(self, key: Key) -> Path:
        """Where a run is kept."""
        name = f"lr{key.lr:.3g}-seed{key.seed}-steps{key.steps}.json"
        return self.folder / key.method / name

    def save(self, key: Key, result: dict) -> None:
        """Keep a run, whole or not at all."""
        path = self.path_of(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)

    def runs(self, method: str) -> list[dict]:
        """All finished runs of a method."""
        files = sorted((self.folder / method).glob("*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in files]

    def search(self, method: str) -> dict[float, float]:
        """Mean final loss by learning rate, of whole runs with the seeds of the search."""
        seeds = SEEDS[: self.settings.search_seeds]
        losses: dict[float, list[float]] = {}
        for result in self.runs(method):
            if result["seed"] in seeds and result["steps"] == self.steps:
                losses.setdefault(result["lr"], []).append(final_loss(result))
        return {lr: sum(of) / len(of) for lr, of in losses.items() if len(of) == len(seeds)}

    def pending(self, method: str) -> list[Key]:
        """Runs that a method needs next: the search first, then seeds and shorter runs."""
        losses = self.search(method)
        rates, seeds = next_rates(METHODS[method].first_rate, losses), SEEDS
        lengths = [self.steps]
        if rates:
            seeds = SEEDS[: self.settings.search_seeds]
        else:
            rates = [best_rate(losses)]
            if METHODS[method].ours or method == BASELINE:
                lengths += [round(self.steps * horizon) for horizon in HORIZONS]
        wanted = itertools.product(rates, lengths, seeds)
        keys = [Key(self.settings.task, method, lr, seed, n) for lr, n, seed in wanted]
        return [key for key in keys if not self.path_of(key).exists()]


def final_loss(result: dict) -> float:
    """Test loss after the last step; infinite if it diverged."""
    loss = result["curve"][-1][1]
    return loss if loss is not None and math.isfinite(loss) else math.inf


def carry_out(studies: list[Study], methods: Iterable[str], n_processes: int) -> None:
    """Run what is pending until nothing is.

    Args:
        studies: one for each task.
        methods: names.
        n_processes: side by side, each with one thread.
    """
    methods = list(methods)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, context, initializer=prepare_process) as pool:
        running = {}
        while True:
            wanted = [
                (study, key) for study in studies for m in methods for key in study.pending(m)
            ]
            for study, key in wanted:
                if key not in running.values() and len(running) < 2 * n_processes:
                    running[pool.submit(_run, study.task, key)] = key
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                key = running.pop(future)
                study = next(s for s in studies if s.settings.task == key.task)
                result = future.result()
                study.save(key, result)
                print(
                    f"{key.task} {key.method} lr {key.lr:g} seed {key.seed}, {key.steps} steps: "
                    f"{final_loss(result):.4f}",
                    flush=True,
                )


def prepare_process() -> None:
    """One thread, as many processes share the cores; no hub; no progress bars."""
    import datasets
    import transformers

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()


@functools.cache
def load_task(name: str) -> Task:
    """A task; its data are read once in a process."""
    settings = load_settings(name)
    return TASKS[settings.task](settings)


def _run(task: str, key: Key) -> dict:
    return run(key, load_task(task))
