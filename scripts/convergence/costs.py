"""What a start and a step cost: each method in a process of its own, as many beside as in a study.

LoRA is measured in every call, and its figures are kept with those of the others, so that a ratio is never one
of two machines.
"""

import multiprocessing
import statistics
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch
from bench_gauges import finished, memory_held
from transformers import PreTrainedModel

from peft_gradinit.files import write_json

from .half import half_products
from .methods import METHODS
from .study import BASELINE, Study, load_task, prepare_process
from .tasks import Task, select, size
from .training import calibration_batches

N_STEPS = 10
N_FIRST = 2
"""Steps that are not counted: allocations, caches. The memory is that of as many."""
RATIOS = ("step_seconds", "peak_mib")
"""What is told in units of LoRA's."""


def measure_costs(
    studies: list[Study], methods: Iterable[str], n_processes: int, device: str = "cpu"
) -> None:
    """Measure, and keep in `costs.json` of every study; arguments as for `carry_out`."""
    methods = list(dict.fromkeys([BASELINE, *methods]))
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
        of_lora = {f"lora_{name}": found[BASELINE][name] for name in RATIOS}
        for method, costs in found.items():
            costs.update(of_lora)
            print(f"{study.settings.task} {method}: {costs}")
        study.folder.mkdir(parents=True, exist_ok=True)
        write_json(study.folder / "costs.json", study.kept("costs") | found)


def _measure(task_name: str, name: str, device: str) -> dict[str, float]:
    """Seconds of the start, seconds of a step, and the most memory beside the loaded model."""
    task, where = load_task(task_name, device), torch.device(device)
    start, steps = _seconds(name, task.load_model(), task, N_STEPS)
    model = task.load_model()
    with memory_held(where) as peak:
        _seconds(name, model, task, N_FIRST)
    return {
        "start_seconds": start,
        "step_seconds": statistics.median(steps[N_FIRST:]),
        "peak_mib": peak[0] / 2**20,
    }


def _seconds(
    name: str, model: PreTrainedModel, task: Task, n_steps: int
) -> tuple[float, list[float]]:
    """Of the start, and of every step."""
    method, training, seconds = METHODS[name], task.settings.training, []
    batches = calibration_batches(task, 0)
    torch.manual_seed(0)
    with half_products(model):  # as in the runs
        started = finished(model.device)
        adapted: Any = method.start(model, task, batches)
        start = finished(model.device) - started
        lr = method.first_rate
        optimizer = method.optimizer(adapted, lr, training.head_rate(lr))
        adapted.train()
        for step in range(n_steps):
            indices = torch.arange(step * training.batch_size, (step + 1) * training.batch_size)
            started = finished(model.device)
            adapted(**select(task.train, indices % size(task.train))).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            seconds.append(finished(model.device) - started)
    return start, seconds
