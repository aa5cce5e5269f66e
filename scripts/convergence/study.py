"""A study: the runs that its plan asks for, on disk, made by several processes."""

import functools
import itertools
import json
import math
import multiprocessing
import statistics
import warnings
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from pathlib import Path

import torch

from peft_gradinit.files import write_json

from .methods import METHODS
from .plan import TOLERANCE, Losses, best_rate, neighbouring_rates, next_rates, rate
from .settings import load_settings
from .tasks import TASKS, Task, on_device, with_few_labels
from .training import Key, calibration_steps, run, start_steps

BASELINE = "lora"
REFERENCES = (BASELINE, "lora_output", "full")
WITH_OUTPUT = ("topics", "functions", "reference")
"""Tasks whose model has an output layer."""
SHORTER = 0.6
"""Shorter runs, 60 % of the task's steps, calibration included, of the references and of those of our types that end near the
baseline, with a schedule and a best rate of their own: what a user would do who is in a hurry."""
LONGER = 4
"""How many times as long the longer runs are, with a schedule and a best rate of their own."""
ALSO_LONGER = (
    *("full", BASELINE, "lora_output", "dora", "lora_one_auto", "lora_one_auto_output"),
    *("lora_one_ranks+lora_muon", "lora_one_ranks_dora+lora_muon"),
    *("lora_output+lora_muon", "lora_output+lora_muon_0.8", "lora_one_auto_output+lora_muon"),
)
"""Methods that have longer runs."""
PARTS = ("search", "shorter", "longer")
"""Runs that can be asked for alone."""
Searches = Mapping[str, Losses]
"""Mean final loss by learning rate, by method."""


class Study:
    """Results of one task, by method.

    Args:
        folder: of all results; those of other settings lie beside these.
        task: name of the task, or path of its file.
        published: searches that a folder need not have for runs of other lengths, and for what is
            measured at the best rate.
    """

    def __init__(self, folder: Path, task: str, published: Searches | None = None):
        self.task = task
        self.published = published or {}
        self.settings = load_settings(task)
        self.folder = folder / self.settings.task / self.settings.key
        self.steps = self.settings.training.steps

    def has(self, method: str) -> bool:
        """Whether a method can run on the task: some need an output layer."""
        return self.settings.task in WITH_OUTPUT or not METHODS[method].has_output

    @property
    def whole(self) -> int:
        """Steps of a whole run, the calibration included."""
        return round(self.steps + calibration_steps(self.settings))

    def trained(self, method: str) -> int:
        """Steps that a method trains in a whole run: what has no calibration trains in its place."""
        return round(self.whole - start_steps(METHODS[method], self.settings))

    def shorter(self, method: str) -> int:
        """Steps of a method's shorter runs: what calibrating leaves of 60 %."""
        return round(self.steps * SHORTER - start_steps(METHODS[method], self.settings))

    def longer(self) -> int:
        """Steps of longer runs."""
        return self.steps * LONGER

    def path_of(self, key: Key) -> Path:
        """Where a run is kept."""
        name = f"lr{key.lr:.3g}-seed{key.seed}-steps{key.steps}.json"
        return self.folder / key.method / name

    def save(self, key: Key, result: dict) -> None:
        """Keep a run, whole or not at all."""
        path = self.path_of(key)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, result)

    def kept(self, name: str) -> dict[str, dict]:
        """What was measured beside the runs (`"costs"`, `"changes"`), by method."""
        path = self.folder / f"{name}.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}

    def runs(self, method: str) -> list[dict]:
        """All finished runs of a method."""
        files = sorted((self.folder / method).glob("*.json"))
        return [json.loads(path.read_text(encoding="utf-8")) for path in files]

    def search(self, method: str, steps: int | None = None) -> dict[float, float]:
        """Mean final loss by learning rate of the grid, of runs with the seeds of the search.

        Args:
            method: name.
            steps: of the runs. Default: those of the task, whether a method has a calibration or not.
        """
        seeds = self.settings.searched
        losses: dict[float, list[float]] = {}
        for result in self.runs(method):
            searched = result["seed"] in seeds and rate(result["lr"], 0) == result["lr"]
            if searched and result["steps"] == (steps or self.steps):
                losses.setdefault(result["lr"], []).append(final_loss(result))
        return {lr: sum(of) / len(of) for lr, of in losses.items() if len(of) == len(seeds)}

    def suggested(self, method: str) -> float | None:
        """The rate that the package suggests for a method, to two digits, if it does.

        It is the median over the search, so that it stands when the other runs begin.
        """
        seeds = self.settings.searched
        searched = (r for r in self.runs(method) if r["seed"] in seeds and r["steps"] == self.steps)
        rates = [r["suggested_lr"] for r in searched if r.get("suggested_lr")]
        return float(f"{statistics.median(rates):.2g}") if rates else None

    def searched(self, method: str) -> Losses | None:
        """The losses of a search that is over, here or published."""
        for losses in (self.search(method), self.published.get(method, {})):
            if not next_rates(METHODS[method].first_rate, losses):
                return losses
        return None

    def best(self, method: str) -> float | None:
        """The best rate, by a search that is over, here or published."""
        losses = self.searched(method)
        return None if losses is None else best_rate(losses)

    def pending(self, method: str, only: str | None = None) -> list[Key]:
        """Runs that a method needs next.

        Args:
            method: name.
            only: one of `PARTS`. Default: the search, then the reported seeds, the suggested rate, and
                the shorter and longer runs of those methods that have them.
        """
        if not self.has(method):
            return []
        lengths = {"shorter": self.shorter(method), "longer": self.longer()}
        if only in lengths:
            return self._pending_of_length(method, lengths[only])
        losses = self.search(method)
        rates = next_rates(METHODS[method].first_rate, losses)
        if rates:
            return self._missing(method, rates, self.steps, self.settings.searched)
        if only == "search":
            return []
        suggested = self.suggested(method)
        rates = [best_rate(losses)] + ([] if suggested is None else [suggested])
        wanted = self._missing(method, rates, self.trained(method), self.settings.reported)
        if method in REFERENCES or (METHODS[method].ours and self._is_near_baseline(losses)):
            wanted += self._pending_of_length(method, lengths["shorter"])
        if method in ALSO_LONGER:
            wanted += self._pending_of_length(method, lengths["longer"])
        return wanted

    def _pending_of_length(self, method: str, steps: int) -> list[Key]:
        losses, first = self.search(method, steps), self.best(method)
        if first is None:
            return []
        if rates := neighbouring_rates(first, losses):
            return self._missing(method, rates, steps, self.settings.searched)
        return self._missing(method, [best_rate(losses)], steps, self.settings.reported)

    def _missing(self, method: str, rates: list[float], steps: int, seeds: range) -> list[Key]:
        runs = itertools.product(rates, seeds)
        keys = [Key(self.settings.task, method, lr, seed, steps) for lr, seed in runs]
        return [key for key in keys if not self.path_of(key).exists()]

    def _is_near_baseline(self, losses: Losses) -> bool:
        """Whether a method ends near plain LoRA; one that does not is not run for fewer steps."""
        known = self.search(BASELINE) or self.published.get(BASELINE, {})
        of_baseline = min(known.values(), default=math.inf)
        return min(losses.values()) <= of_baseline * (1 + TOLERANCE)


def final_loss(result: dict) -> float:
    """Test loss after the last step; infinite if it diverged."""
    loss = result["curve"][-1][1]
    return loss if loss is not None and math.isfinite(loss) else math.inf


def carry_out(
    studies: list[Study],
    methods: Iterable[str],
    n_processes: int,
    device: str = "cpu",
    only: str | None = None,
) -> None:
    """Run what is pending until nothing is.

    Args:
        studies: one for each task.
        methods: names.
        n_processes: side by side, each with one thread.
        device: where they train.
        only: one of `PARTS`.
    """
    methods = list(methods)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, context, initializer=prepare_process) as pool:
        running, failed = {}, set()  # variants of a task have its name: a run belongs to its study
        while True:
            wanted = [
                (study, key)
                for study in studies
                for m in methods
                if (study.task, m) not in failed
                for key in study.pending(m, only)
            ]
            for study, key in wanted:
                if (study, key) not in running.values() and len(running) < 2 * n_processes:
                    running[pool.submit(_run, study.task, key, device)] = study, key
            if not running:
                break
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                study, key = running.pop(future)
                if error := future.exception():
                    failed.add((study.task, key.method))  # the other methods go on
                    print(f"{key.task} {key.method} failed: {error!r}", flush=True)
                    continue
                result = future.result()
                study.save(key, result)
                print(
                    f"{key.task} {key.method} lr {key.lr:g} seed {key.seed}, {key.steps} steps: "
                    f"{final_loss(result):.4f}",
                    flush=True,
                )
    if failed:
        raise SystemExit(f"failed: {sorted(failed)}")


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
def load_task(name: str, device: str = "cpu") -> Task:
    """A task; its data are read once in a process."""
    settings = load_settings(name)
    return on_device(with_few_labels(TASKS[settings.task](settings)), device)


def _run(task: str, key: Key, device: str) -> dict:
    loaded = load_task(task, device)
    return run(key, loaded, at_end_only=key.seed in loaded.settings.searched)
