"""What a start and a step cost: each method in a process of its own, as many beside as in a study."""

import multiprocessing
import resource
import statistics
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from transformers import PreTrainedModel

from peft_gradinit.files import write_json

from .half import half_products
from .method import Method
from .methods import METHODS
from .study import Study, load_task, prepare_process
from .tasks import Task, select, size
from .training import calibration_batches

N_STEPS = 10
N_FIRST = 2
"""Steps that are not counted: allocations, caches."""


def measure_costs(
    studies: list[Study], methods: Iterable[str], n_processes: int, device: str = "cpu"
) -> None:
    """Measure, and keep in `costs.json` of every study; arguments as for `carry_out`."""
    context = multiprocessing.get_context("spawn")
    for study in studies:
        pool = ProcessPoolExecutor(
            n_processes, context, initializer=prepare_process, max_tasks_per_child=1
        )
        with pool:
            pending = {
                m: pool.submit(_measure, study.task, m, device) for m in methods if study.has(m)
            }
            found = {m: future.result() for m, future in pending.items()}
        for method, costs in found.items():
            print(f"{study.settings.task} {method}: {costs}")
        study.folder.mkdir(parents=True, exist_ok=True)
        write_json(study.folder / "costs.json", study.kept("costs") | found)


def _measure(task_name: str, name: str, device: str) -> dict[str, float]:
    """Seconds of the start, seconds of a step, and peak memory beyond the loaded model."""
    task, method = load_task(task_name, device), METHODS[name]
    torch.manual_seed(0)
    model = task.load_model()
    with half_products(model):  # as in the runs
        return _measured(method, model, task, device)


def _measured(method: Method, model: PreTrainedModel, task: Task, device: str) -> dict[str, float]:
    training = task.settings.training
    batches = calibration_batches(task, 0)
    loaded = _peak_mib(device)
    started = time.perf_counter()
    adapted: Any = method.start(model, task, batches)
    _finish(device)
    start_seconds = time.perf_counter() - started
    after_start = _peak_mib(device)
    optimizer = method.optimizer(adapted, method.first_rate, training.head_learning_rate)
    adapted.train()
    seconds = []
    for step in range(N_STEPS):
        indices = torch.arange(step * training.batch_size, (step + 1) * training.batch_size)
        started = time.perf_counter()
        adapted(**select(task.train, indices % size(task.train))).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        _finish(device)
        seconds.append(time.perf_counter() - started)
    return {
        "start_seconds": start_seconds,
        "step_seconds": statistics.median(seconds[N_FIRST:]),
        "start_mib": after_start - loaded,
        "training_mib": _peak_mib(device) - loaded,
    }


def _finish(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def _peak_mib(device: str) -> float:
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
