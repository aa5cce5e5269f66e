"""Accuracy of the gradient sketch on real gradients, by size and by number of orientations.

    python scripts/bench_sketch.py [--sequences 64 --widths 64 80 96 112 128 --seeds 2]
    python scripts/bench_sketch.py --model smollm2 --widths 112 --seeds 1
    python scripts/bench_sketch.py --rank 8 --widths 64 72 80 96

Error of the rank-16 reconstruction of each of MiniLM's encoder layers over the best possible
rank-16 error, on 64 docstrings: median and worst layer. Or of the 210 linear layers of SmolLM2's
blocks, on functions as chats. "energy" is what the left and right singular vectors capture of the
gradient's energy, over the most that rank 16 can. Memory is that of one 4096 x 4096 layer, as a
share of its dense gradient, and that of the model's layers together. The default is the row marked
with a star.
"""

import argparse
import os
import statistics
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import smollm2_chats
import torch
import transformers
from minilm_task import load_model, load_task, load_tokenizer
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding

from peft_gradinit import Calibration
from peft_gradinit.calibration import Feed, GradientRecorder, Gradients, LayerStatistics, run_pass
from peft_gradinit.calibration.feed import batches
from peft_gradinit.calibration.resume import Resume
from peft_gradinit.layouts import Processes
from peft_gradinit.recipes import load_model as load_model_of
from peft_gradinit.statistics import DenseGradient, SketchedGradient, TestMatrixPool
from peft_gradinit.statistics.gradient_sketch import default_width

FIRST_ORIENTATIONS = {"none": 10**9, "after 8": 8, "after 8 and 24": 8}


class OneOrientation(SketchedGradient):
    """Orients once only."""

    def orient(self) -> None:
        """Ignore all orientations but the first."""
        if not self.oriented():
            super().orient()


@dataclass
class Bench:
    """A model and data.

    Attributes:
        load: makes the model.
        blocks: name of the module with the layers.
        loader: of the data.
    """

    load: Callable[[], nn.Module]
    blocks: str
    loader: DataLoader

    def layers(self, model: nn.Module) -> dict[str, nn.Module]:
        """The linear layers of the blocks."""
        layers = model.get_submodule(self.blocks).named_modules()
        return {name: m for name, m in layers if isinstance(m, nn.Linear)}


def minilm(n: int) -> Bench:
    """The encoder on docstrings."""
    collate = DataCollatorWithPadding(load_tokenizer())
    rows = load_task()["train"].select(range(n))
    return Bench(load_model, "bert.encoder", DataLoader(rows, batch_size=8, collate_fn=collate))


def smollm2(n: int) -> Bench:
    """The language model on functions as chats."""
    load = partial(load_model_of, smollm2_chats.MODEL)
    return Bench(load, "model.layers", smollm2_chats.loader(n, batch_size=4))


def fill(kind: str, width: int, seed: int, bench: Bench) -> dict:
    """Run a pass with one estimator on every layer."""
    model, pool = bench.load(), TestMatrixPool()
    modules = bench.layers(model)
    cls = OneOrientation if kind == "after 8" else SketchedGradient
    filled = {
        name: DenseGradient(m.out_features, m.in_features)
        if kind == "dense"
        else cls(m.out_features, m.in_features, width=width, seed=seed, pool=pool)
        for name, m in modules.items()
    }
    batches.FIRST_ORIENTATION = FIRST_ORIENTATIONS.get(kind, 10**9)
    calibration = Calibration(bench.loader, progress=False, seed=seed)
    layers = LayerStatistics(filled)
    recorder = GradientRecorder(model, layers, calibration, Gradients(), Processes(), {})
    run_pass(recorder, modules, Feed(calibration, model), Resume())
    return filled


def errors(filled: dict, exact: dict[str, Tensor], rank: int) -> list[tuple[float, float]]:
    """Error over the best possible error, and energy captured over the most possible, by layer."""
    ratios = []
    for name, G in exact.items():
        squares = torch.linalg.svdvals(G).square()
        found = filled[name].triplets(rank)
        error = (G - found.matrix()).norm() / squares[rank:].sum().sqrt()
        energy = (found.U.mT @ G @ found.Vh.mT).square().sum() / squares[:rank].sum()
        ratios.append((error.item(), energy.item()))
    return ratios


def memory_share(width: int, kind: str) -> str:
    """Floats kept for a 4096 x 4096 layer, over those of its gradient."""
    sketch = SketchedGradient(4096, 4096, width=width, seed=0, pool=TestMatrixPool())
    kept = width + (0 if kind == "none" else sketch.n_oriented)
    return f"1/{4096 / (2 * kept):.1f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("minilm", "smollm2"), default="minilm")
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 80, 96, 112, 128])
    parser.add_argument("--rank", type=int, default=16, help="triplets that are read")
    parser.add_argument("--seeds", type=int, default=2, help="how many")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    bench = {"minilm": minilm, "smollm2": smollm2}[options.model](options.sequences)
    dense = fill("dense", 0, 0, bench)
    exact = {name: s.mean() for name, s in dense.items()}
    held = sum(s.n_bytes() for s in dense.values()) / 2**20
    table = Table(title=f"{len(exact)} layers, {options.seeds} seeds; dense: {held:.0f} MiB")
    for column in ("width", "orientations", "median", "worst", "memory at 4096", "memory here"):
        table.add_column(column, justify="right")
    table.add_column("energy: best, median, worst", justify="right")
    for kind in FIRST_ORIENTATIONS:
        for width in options.widths:
            filled = [fill(kind, width, seed, bench) for seed in range(options.seeds)]
            ratios, energies = zip(
                *(r for sketches in filled for r in errors(sketches, exact, options.rank)),
                strict=True,
            )
            star = " *" if (width, kind) == (default_width(options.rank), "after 8 and 24") else ""
            held = sum(s.n_bytes() for s in filled[0].values()) / 2**20
            table.add_row(
                f"{width}{star}",
                kind,
                f"{statistics.median(ratios):.3f}",
                f"{max(ratios):.3f}",
                memory_share(width, kind),
                f"{held:.0f} MiB",
                f"{max(energies):.4f}, {statistics.median(energies):.4f}, {min(energies):.4f}",
            )
    Console().print(table)


if __name__ == "__main__":
    main()
