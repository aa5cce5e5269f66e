"""What training changed beside the task: sizes and directions of the weights.

The first reported seed of each method is trained again at its best rate, and its weights are looked at
after it; the other runs keep their losses alone.
"""

import functools
import multiprocessing
import statistics
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor

import torch
from peft import PeftModel
from torch import Tensor, nn

from peft_gradinit.analysis.intruders import THRESHOLD, TOP
from peft_gradinit.files import write_json
from peft_gradinit.linalg import TruncatedSVD, intruder_dimensions, truncated_svd

from .method import HEADS
from .study import Study, load_task, prepare_process
from .training import Key, run


def measure_changes(
    studies: list[Study], methods: Iterable[str], n_processes: int, device: str = "cpu"
) -> None:
    """Measure, and keep in `changes.json` of every study what is not there at the best rate.

    Methods whose search is not over are left out; arguments as for `carry_out`.
    """
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(n_processes, context, initializer=prepare_process) as pool:
        for study in studies:
            known = study.kept("changes")
            keys = {m: key for m in methods if (key := _key(study, m))}
            keys = {m: k for m, k in keys.items() if known.get(m, {}).get("lr") != k.lr}
            pending = {m: pool.submit(_measure, study.task, k, device) for m, k in keys.items()}
            for method, future in pending.items():
                found = {**future.result(), "lr": keys[method].lr}
                print(f"{study.settings.task} {method}: {found}", flush=True)
                write_json(study.folder / "changes.json", study.kept("changes") | {method: found})


def _key(study: Study, method: str) -> Key | None:
    lr = study.best(method) if study.has(method) else None
    if lr is None:
        return None
    return Key(study.settings.task, method, lr, study.settings.reported[0], study.trained(method))


def _measure(task_name: str, key: Key, device: str) -> dict[str, float]:
    """Intruders of a layer on average, and the relative size of the change."""
    found: dict[str, float] = {}

    def after(model: nn.Module) -> None:
        model.float()  # a merge into bfloat16 rounds changes below half a per cent away
        merged = model.merge_and_unload() if isinstance(model, PeftModel) else model
        found.update(_of_weights(task_name, device, weights(merged)))

    run(key, load_task(task_name, device), after)
    return found


def weights(model: nn.Module) -> dict[str, Tensor]:
    """The matrices of linear layers; a new head has no old one to be compared with."""
    return {
        name: module.weight.detach()
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and name.rpartition(".")[2] not in HEADS
    }


def _of_weights(task_name: str, device: str, tuned: dict[str, Tensor]) -> dict[str, float]:
    counts, sizes = [], []
    for name, (weight, base) in _base(task_name, device).items():
        change = tuned[name].float() - weight
        sizes.append((change.norm() / weight.norm()).item())
        counts.append(n_intruders(tuned[name].float(), base) if change.any() else 0)
    return {"intruders": statistics.mean(counts), "size": statistics.mean(sizes)}


def n_intruders(tuned: Tensor, base: TruncatedSVD) -> int:
    """How many of the ten leading left singular vectors of a weight its base lacks."""
    leading = truncated_svd(tuned, min(TOP, *tuned.shape))
    return len(intruder_dimensions(leading, base.U, THRESHOLD))


@functools.cache
def _base(task_name: str, device: str) -> dict[str, tuple[Tensor, TruncatedSVD]]:
    """Pretrained weights and all their singular vectors, once in a process."""
    with torch.no_grad():
        found = {
            n: w.float() for n, w in weights(load_task(task_name, device).load_model()).items()
        }
        return {n: (w, truncated_svd(w, min(w.shape))) for n, w in found.items()}
