"""Runs a function of a test module in two processes over gloo, and gives back what they return."""

import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
_MAIN = """
import pickle, sys, torch
torch.set_num_threads(1)
from datetime import timedelta
import torch.distributed as dist
directory, module, name, rank, size, backend = sys.argv[1:7]
import importlib
function = getattr(importlib.import_module(module), name)  # which may make the backend known
if size != "1":
    dist.init_process_group(backend, f"file://{directory}/init", timeout=timedelta(seconds=60),
                            rank=int(rank), world_size=int(size))
try:
    result = ("value", function())
except Exception as error:
    result = ("error", f"{type(error).__name__}: {error}")
with open(f"{directory}/{rank}", "wb") as file:
    pickle.dump(result, file)
"""


def launch(
    module: str, function: str, size: int = 2, timeout: float = 120, backend: str = "gloo"
) -> list:
    """Run `module.function()` on every process; `("value", …)` or `("error", text)` by rank.

    A process that was killed gives `("killed", exit code)`.
    """
    with tempfile.TemporaryDirectory() as directory:
        environment = os.environ | {
            "PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        }
        running = [
            subprocess.Popen(
                [
                    sys.executable,
                    "-W",
                    "ignore",
                    "-c",
                    _MAIN,
                    directory,
                    module,
                    function,
                    str(rank),
                    str(size),
                    backend,
                ],
                cwd=ROOT,
                env=environment | _names_of(rank, size),
            )
            for rank in range(size)
        ]
        try:
            codes = [process.wait(timeout) for process in running]
        finally:
            for process in running:
                process.kill()
        return [_result(Path(directory) / str(rank), code) for rank, code in enumerate(codes)]


def _names_of(rank, size):
    """What a launcher tells the processes that it starts."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    names |= {"OMP_NUM_THREADS": 1, "MASTER_ADDR": "localhost", "MASTER_PORT": 29500}
    return {name: str(value) for name, value in names.items()}


def _result(path: Path, code: int):
    return pickle.loads(path.read_bytes()) if path.exists() else ("killed", code)
