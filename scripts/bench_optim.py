"""Cost of the optimisers of pairs, next to AdamW's.

    python scripts/bench_optim.py [--hidden 1536 --layers 3 --rank 8 --repetitions 5]

One Llama-shaped model with a plain LoRA on all projections, random tokens. In every repetition each
optimiser takes its turn right after AdamW (foreach): a training step, forward, backward and
optimiser, and within it the optimiser's own part. Ratios are of such neighbours. Memory is the
numbers that the optimiser keeps between steps. Prints medians with their range; `--json FILE` keeps
the figures.
"""

import argparse
import json
import statistics
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import bench_models
import torch
from bench_gauges import finished
from peft import LoraConfig, get_peft_model
from rich.console import Console
from rich.table import Table
from torch import nn

from peft_gradinit.optim import LoraMuon, LoraOne, LoraPro, LoraRite

N_WARM = 2
console = Console()

CANDIDATES: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "LoRA-Muon": lambda model: LoraMuon(model, lr=1e-3),
    "LoRA-RITE": lambda model: LoraRite(model, lr=1e-5),
    "LoRA-One, AdamW": lambda model: LoraOne(model, lr=1e-5),
    "LoRA-One, GD": lambda model: LoraOne(model, lr=1e-5, mode="gd"),
    "LoRA-Pro, efficient": lambda model: LoraPro(model, lr=1e-5, mode="efficient"),
    "LoRA-Pro, full": lambda model: LoraPro(model, lr=1e-5),
}


def make_model(options: argparse.Namespace) -> nn.Module:
    """The shape of `bench_calibration`, with a LoRA."""
    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear")
    size = {"hidden": options.hidden, "layers": options.layers}
    base = bench_models.make_model("random", device=options.device, **size)
    return get_peft_model(base, lora).train()


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    """What they are compared with."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(parameters, lr=1e-5, weight_decay=0.0, foreach=True)


def time_step(
    model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any
) -> tuple[float, float]:
    """Seconds of a training step, and of the optimiser's part."""
    device = batch["input_ids"].device
    started = finished(device)
    model(**batch).loss.backward()
    ready = finished(device)
    optimizer.step()
    ended = finished(device)
    optimizer.zero_grad()
    return ended - started, ended - ready


def state_numbers(optimizer: torch.optim.Optimizer) -> int:
    """Entries of the tensors that the optimiser keeps, single numbers not counted."""
    entries = [e for state in optimizer.state.values() for e in state.values()]
    return sum(e.numel() for e in entries if isinstance(e, torch.Tensor) and e.ndim)


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """All figures."""
    model = make_model(options)
    generator = torch.Generator().manual_seed(1)
    shape = (options.batch_size, options.length)
    ids = torch.randint(0, bench_models.VOCABULARY, shape, generator=generator).to(options.device)
    batch = {"input_ids": ids, "labels": ids}
    optimizers = {"AdamW": adamw(model)}
    optimizers |= {name: make(model) for name, make in CANDIDATES.items()}
    for optimizer in optimizers.values():
        for _ in range(N_WARM):
            time_step(model, optimizer, batch)
    rows: dict[str, dict[str, list[float]]] = {}
    for _ in range(options.repetitions):
        for name in CANDIDATES:
            pair = [time_step(model, optimizers[o], batch) for o in ("AdamW", name)]
            row = rows.setdefault(name, {"step": [], "optimiser": [], "ms": [], "AdamW ms": []})
            row["step"].append(pair[1][0] / pair[0][0])
            row["optimiser"].append(pair[1][1] / pair[0][1])
            row["ms"].append(1e3 * pair[1][1])
            row["AdamW ms"].append(1e3 * pair[0][1])
    base = state_numbers(optimizers["AdamW"])
    memory = {name: state_numbers(optimizers[name]) / base for name in CANDIDATES}
    return {"rows": rows, "state": memory}


def spread(values: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"


def show(options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Print the table."""
    title = f"hidden {options.hidden}, {options.layers} layers, r {options.rank}, {options.device}"
    table = Table(title=f"{title}; ratios to AdamW")
    for column in ("", "training step", "optimiser alone", "optimiser, ms", "AdamW, ms", "state"):
        table.add_column(column, justify="left" if not column else "right")
    for name, row in figures["rows"].items():
        cells = [spread(row[key]) for key in ("step", "optimiser", "ms", "AdamW ms")]
        table.add_row(name, *cells, f"{figures['state'][name]:.2f}")
    console.print(table)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (
        ("hidden", 1536),
        ("layers", 3),
        ("rank", 8),
        ("repetitions", 5),
        ("batch-size", 2),
        ("length", 512),
    ):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    figures = measure(options)
    show(options, figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
