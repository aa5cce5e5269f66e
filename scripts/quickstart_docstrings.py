"""The quickstart's task `docstrings`: MiniLM says which module a docstring is from.

Every start and plain LoRA, at the same budget and each at its own learning rate. Prints a table,
writes `out/quickstart/` (adapters, picture, results), and loads every adapter in a new process with
plain PEFT.
"""

import argparse
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
from minilm_task import MODULES, load_model, load_task, load_tokenizer
from peft import LoraConfig, PeftConfig, get_peft_model
from quickstart_metrics import Accuracy, MacroF1
from quickstart_plots import draw
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from peft_gradinit import (
    Calibration,
    EvaConfig,
    LoraGAConfig,
    LoraOneConfig,
    SVFitConfig,
    calibrate,
)

OUT = Path("out/quickstart")
N_STEPS, N_TEST, BATCH_SIZE, N_CALIBRATION = 100, 400, 16, 64
ADAPTER = {
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": True,
    "target_modules": "all-linear",
    "task_type": "SEQ_CLS",
}
METHODS = {"LoRA": 3e-3, "LoRA-GA": 1e-3, "LoRA-One": 3e-3, "EVA": 2e-3, "SVFit": 3e-2}
GRID = {  # METHODS holds the best of each, see --sweep
    "LoRA": (1e-3, 2e-3, 3e-3, 5e-3),
    "LoRA-GA": (5e-4, 1e-3, 2e-3, 3e-3),
    "LoRA-One": (2e-3, 3e-3, 5e-3),
    "EVA": (2e-3, 3e-3, 5e-3),
    "SVFit": (1e-2, 3e-2, 1e-1, 3e-1),
}
HEAD_RATE = 3e-3
"""Of the new classification head, the same for all: what is compared are adapters, and a head that
trains ten times faster is worth more than any of their differences."""
console = Console()


@dataclass
class Run:
    """What one fine-tuning run gave.

    Attributes:
        losses: training loss of every step.
        scores: `accuracy` and `macro_f1` on the test split.
        start_seconds: `get_peft_model`, calibration included.
        seconds: training time.
        n_trainable: trainable numbers of the adapter, the classification head not counted.
    """

    losses: list[float]
    scores: dict[str, float]
    start_seconds: float
    seconds: float
    n_trainable: int

    def mean_loss(self, first: int, last: int) -> float:
        """Mean loss of the steps `first` to `last`, 1-based."""
        return float(np.mean(self.losses[first - 1 : last]))


def make_config(method: str, data: datasets.DatasetDict) -> PeftConfig:
    """The config of a method, all of rank 8."""
    if method == "SVFit":
        return SVFitConfig(r=8, target_modules="all-linear", task_type="SEQ_CLS")
    if method == "LoRA":
        return LoraConfig(**ADAPTER)
    calibration = Calibration(calibration_loader(data))
    if method == "LoRA-GA":
        return LoraGAConfig(**ADAPTER, stable_gamma=64, calibration=calibration)  # paper's commands
    config_class = {"LoRA-One": LoraOneConfig, "EVA": EvaConfig}[method]
    return config_class(**ADAPTER, calibration=calibration)


def calibration_loader(data: datasets.DatasetDict) -> DataLoader:
    """The first 64 training docstrings."""
    rows = data["train"].select(range(N_CALIBRATION))
    return DataLoader(rows, batch_size=8, collate_fn=DataCollatorWithPadding(load_tokenizer()))


def compute_metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
    """Accuracy and macro-F1 through `evaluate`."""
    arguments = {
        "predictions": prediction.predictions.argmax(-1),
        "references": prediction.label_ids,
    }
    return Accuracy().compute(**arguments) | MacroF1().compute(**arguments)


def optimizer_for(model: torch.nn.Module, lr: float) -> torch.optim.Optimizer:
    """AdamW with the adapter at its own learning rate and the head at that of all."""
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    head = {"params": [p for name, p in trained if "classifier" in name], "lr": HEAD_RATE}
    adapter = {"params": [p for name, p in trained if "classifier" not in name], "lr": lr}
    return torch.optim.AdamW([head, adapter], weight_decay=0.0)


def train(
    method: str, lr: float, data: datasets.DatasetDict, n_steps: int, seed: int
) -> tuple[Run, Trainer]:
    """One run of `transformers.Trainer`."""
    base = load_model()
    started = time.perf_counter()
    model = get_peft_model(base, make_config(method, data))
    cost = time.perf_counter() - started
    arguments = TrainingArguments(
        output_dir=str(OUT / method),
        max_steps=n_steps,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=64,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=seed,
        disable_tqdm=not console.is_terminal,
        use_cpu=True,
    )
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=load_tokenizer(),
        compute_metrics=compute_metrics,
        optimizers=(optimizer_for(model, lr), None),
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    scores = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    kept = {k: scores[k] for k in ("accuracy", "macro_f1")}
    adapter = [p for n, p in model.named_parameters() if "classifier" not in n and p.requires_grad]
    return Run(losses, kept, cost, seconds, sum(p.numel() for p in adapter)), trainer


def table(runs: dict[str, Run], rates: dict[str, float]) -> Table:
    """Results side by side."""
    n_steps = min(len(r.losses) for r in runs.values())
    rows = Table(title=f"{len(MODULES)}-way docstring classification, MiniLM, r=8, {n_steps} steps")
    rows.add_column("")
    for method in runs:
        rows.add_column(method, justify="right")

    def add(name: str, values: list[str]) -> None:
        rows.add_row(name, *values)

    add("learning rate", [f"{rates[m]:g}" for m in runs])
    add("trainable", [f"{r.n_trainable:,}" for r in runs.values()])
    add("start, s", [f"{r.start_seconds:.1f}" for r in runs.values()])
    add("training, s", [f"{r.seconds:.0f}" for r in runs.values()])
    for last in sorted({n for n in (10, 25, 50) if n < n_steps} | {n_steps}):
        first = max(1, last - 9)
        add(
            f"loss, steps {first}-{last}",
            [f"{r.mean_loss(first, last):.3f}" for r in runs.values()],
        )
    add("test accuracy", [f"{r.scores['accuracy']:.3f}" for r in runs.values()])
    add("test macro-F1", [f"{r.scores['macro_f1']:.3f}" for r in runs.values()])
    return rows


def reload_in_new_process(folders: list[Path]) -> list[dict]:
    """Evaluate the saved adapters where this package is never imported."""
    script = Path(__file__).with_name("reload_with_plain_peft.py")
    done = subprocess.run(
        [sys.executable, str(script), str(OUT / "test"), *map(str, folders)],
        check=True,
        capture_output=True,
        text=True,
    )
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


def quickstart(methods: list[str], data: datasets.DatasetDict, n_steps: int, seed: int) -> None:
    """The comparison at each method's own learning rate."""
    console.print(f"{len(data['train'])} training and {len(data['test'])} test docstrings")
    data["test"].save_to_disk(OUT / "test")  # other imports could change the docstrings there
    runs = {}
    for method in methods:
        lr = METHODS[method]
        console.print(f"{method} at learning rate {lr:g} …")
        runs[method], trainer = train(method, lr, data, n_steps, seed)
        trainer.model.save_pretrained(OUT / method)
        reports = getattr(trainer.model.base_model, "init_report", {})
        if reports:
            console.print(reports["default"].summary(), style="dim")
    console.print(table(runs, METHODS))
    # What get_peft_model measured for LoRA-GA, by itself: it can be saved and reused.
    gradients = calibrate(load_model(), LoraGAConfig(**ADAPTER), calibration_loader(data))
    picture = draw({m: r.losses for m, r in runs.items()}, gradients, OUT / "quickstart.png")
    (OUT / "results.json").write_text(json.dumps({m: vars(r) for m, r in runs.items()}, indent=1))
    console.print(f"adapters, results and the picture are in {picture.parent}")
    report_reload(runs)


def report_reload(runs: dict[str, Run]) -> None:
    """Compare every adapter, loaded by plain PEFT in a new process, with the live one."""
    reloaded = reload_in_new_process([OUT / method for method in runs])
    rows = Table(title=f"loaded by plain PEFT {reloaded[0]['peft']} in a new process")
    for column in ("adapter", "peft_type", "r", "accuracy", "live", "peft_gradinit imported"):
        rows.add_column(column)
    for (method, run), found in zip(runs.items(), reloaded, strict=True):
        live = run.scores["accuracy"]
        rows.add_row(
            method,
            found["peft_type"],
            str(found["r"]),
            f"{found['accuracy']:.4f}",
            f"{live:.4f}",
            str(found["plugin_imported"]),
        )
        if found["accuracy"] != live or found["plugin_imported"]:
            console.print(rows)
            raise SystemExit(f"the reloaded {method} adapter is not the live one")
    console.print(rows)


def sweep(methods: list[str], data: datasets.DatasetDict, n_steps: int, seed: int) -> None:
    """Final loss and accuracy of each method over its grid of learning rates."""
    rows = Table(title="loss of the last 25 steps / test accuracy")
    for column in ("method", "learning rate", "loss", "accuracy"):
        rows.add_column(column)
    for method in methods:
        for lr in GRID[method]:
            run, _ = train(method, lr, data, n_steps, seed)
            loss = run.mean_loss(max(1, n_steps - 24), n_steps)
            console.print(f"{method} {lr:g}: {loss:.3f}, {run.scores['accuracy']:.3f}")
            rows.add_row(method, f"{lr:g}", f"{loss:.3f}", f"{run.scores['accuracy']:.3f}")
    console.print(rows)


def run(arguments: argparse.Namespace) -> None:
    """The comparison, or the sweep behind it."""
    datasets.disable_progress_bars()
    OUT.mkdir(parents=True, exist_ok=True)
    data = load_task(arguments.test_size)
    n_steps = arguments.steps or N_STEPS
    if arguments.sweep is None:
        quickstart(arguments.methods or list(METHODS), data, n_steps, arguments.seed)
    else:
        sweep(arguments.sweep or list(METHODS), data, n_steps, arguments.seed)
