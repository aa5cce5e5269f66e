"""Accuracy of the gradient sketch on real gradients, by size and by number of orientations.

    python scripts/bench_sketch.py [--sequences 64 --widths 64 80 96 112 128 --seeds 2]

Error of the rank-16 reconstruction of each of MiniLM's encoder layers over the best possible
rank-16 error, on 64 docstrings: median and worst layer. Memory is that of one 4096 x 4096 layer,
as a share of its dense gradient. The default is the row marked with a star.
"""

import argparse
import os
import statistics
import warnings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
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
from peft_gradinit.statistics import DenseGradient, SketchedGradient, TestMatrixPool

RANK = 16
FIRST_ORIENTATIONS = {"none": 10**9, "after 8": 8, "after 8 and 24": 8}


class OneOrientation(SketchedGradient):
    """Orients once only."""

    def orient(self) -> None:
        """Ignore all orientations but the first."""
        if not self.oriented():
            super().orient()


def encoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers of the encoder."""
    layers = model.get_submodule("bert.encoder").named_modules()
    return {name: m for name, m in layers if isinstance(m, nn.Linear)}


def fill(kind: str, width: int, seed: int, loader: DataLoader) -> dict:
    """Run a pass with one estimator on every layer."""
    model, pool = load_model(), TestMatrixPool()
    modules = encoder_layers(model)
    cls = OneOrientation if kind == "after 8" else SketchedGradient
    filled = {
        name: DenseGradient(m.out_features, m.in_features)
        if kind == "dense"
        else cls(m.out_features, m.in_features, width=width, seed=seed, pool=pool)
        for name, m in modules.items()
    }
    batches.FIRST_ORIENTATION = FIRST_ORIENTATIONS.get(kind, 10**9)
    calibration = Calibration(loader, progress=False, seed=seed)
    layers = LayerStatistics(filled)
    recorder = GradientRecorder(model, layers, calibration, Gradients(), Processes(), {})
    run_pass(recorder, modules, Feed(calibration, model), Resume())
    return filled


def errors(filled: dict, exact: dict[str, Tensor]) -> list[float]:
    """Error over the best possible error, by layer."""
    ratios = []
    for name, G in exact.items():
        best = torch.linalg.svdvals(G)[RANK:].square().sum().sqrt()
        ratios.append(((G - filled[name].triplets(RANK).matrix()).norm() / best).item())
    return ratios


def memory_share(width: int, kind: str) -> str:
    """Floats kept for a 4096 x 4096 layer, over those of its gradient."""
    sketch = SketchedGradient(4096, 4096, width=width, seed=0, pool=TestMatrixPool())
    kept = width + (0 if kind == "none" else sketch.n_oriented)
    return f"1/{4096 / (2 * kept):.1f}"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 80, 96, 112, 128])
    parser.add_argument("--seeds", type=int, default=2, help="how many")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    rows = load_task()["train"].select(range(options.sequences))
    loader = DataLoader(rows, batch_size=8, collate_fn=DataCollatorWithPadding(load_tokenizer()))
    exact = {name: s.mean() for name, s in fill("dense", 0, 0, loader).items()}
    table = Table(title=f"{len(exact)} layers, {options.seeds} seeds")
    for column in ("width", "orientations", "median", "worst", "memory at 4096"):
        table.add_column(column, justify="right")
    for kind in FIRST_ORIENTATIONS:
        for width in options.widths:
            filled = [fill(kind, width, seed, loader) for seed in range(options.seeds)]
            ratios = [r for sketches in filled for r in errors(sketches, exact)]
            star = " *" if (width, kind) == (2 * RANK + 80, "after 8 and 24") else ""
            table.add_row(
                f"{width}{star}",
                kind,
                f"{statistics.median(ratios):.3f}",
                f"{max(ratios):.3f}",
                memory_share(width, kind),
            )
    Console().print(table)


if __name__ == "__main__":
    main()
