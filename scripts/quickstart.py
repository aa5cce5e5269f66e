"""Fine-tune MiniLM from a LoRA-GA start and from plain LoRA, at the same budget.

    scripts/quickstart                 # sets up .venv, then runs this file
    python scripts/quickstart.py       # in an environment that has the extra `quickstart`
    python scripts/quickstart.py --sweep   # the learning rates behind METHODS

Prints a table, writes `out/quickstart/` (adapters, picture, results), and loads the LoRA-GA adapter
in a new process with plain PEFT.
"""

import argparse
import json
import os
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import datasets
import numpy as np
import transformers
from minilm_task import MODULES, load_model, load_task, load_tokenizer
from peft import LoraConfig, get_peft_model
from quickstart_metrics import Accuracy, MacroF1
from quickstart_plots import draw
from rich.console import Console
from rich.table import Table
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

from peft_gradinit import Calibration, CalibrationResult, LoraGAConfig, calibrate

OUT = Path("out/quickstart")
N_STEPS, BATCH_SIZE, N_CALIBRATION = 150, 16, 64
ADAPTER = {
    "r": 8,
    "lora_alpha": 8,
    "use_rslora": True,
    "target_modules": "all-linear",
    "task_type": "SEQ_CLS",
}
METHODS = {"LoRA": 3e-3, "LoRA-GA": 1e-3}  # each at its best of GRID, see --sweep
GRID = (5e-4, 1e-3, 2e-3, 3e-3, 5e-3)
console = Console()


@dataclass
class Run:
    """What one fine-tuning run gave.

    Attributes:
        losses: training loss of every step.
        scores: `accuracy` and `macro_f1` on the test split.
        calibration_seconds: cost of the start.
        seconds: training time, calibration not counted.
    """

    losses: list[float]
    scores: dict[str, float]
    calibration_seconds: float
    seconds: float

    def mean_loss(self, first: int, last: int) -> float:
        """Mean loss of the steps `first` to `last`, 1-based."""
        return float(np.mean(self.losses[first - 1 : last]))


def make_config(method: str, calibration: CalibrationResult | None) -> LoraConfig:
    """The config of a method; both have the same adapter shape."""
    if method == "LoRA":
        return LoraConfig(**ADAPTER)
    return LoraGAConfig(**ADAPTER, stable_gamma=64, calibration=calibration)  # the paper's commands


def measure(data: datasets.DatasetDict) -> CalibrationResult:
    """Calibrate on the first 64 training docstrings."""
    collate = DataCollatorWithPadding(load_tokenizer())
    loader = DataLoader(
        data["train"].select(range(N_CALIBRATION)), batch_size=8, collate_fn=collate
    )
    config = LoraGAConfig(**ADAPTER)
    # get_peft_model does this by itself when the config holds the loader; here the result is kept
    # for the picture, and shows that it can be saved and reused.
    return calibrate(load_model(), config, Calibration(loader))


def compute_metrics(prediction: transformers.EvalPrediction) -> dict[str, float]:
    """Accuracy and macro-F1 through `evaluate`."""
    arguments = {
        "predictions": prediction.predictions.argmax(-1),
        "references": prediction.label_ids,
    }
    return Accuracy().compute(**arguments) | MacroF1().compute(**arguments)


def train(
    method: str, lr: float, data: datasets.DatasetDict, calibration: CalibrationResult
) -> tuple[Run, Trainer]:
    """One run of `transformers.Trainer`."""
    model = get_peft_model(load_model(), make_config(method, calibration))
    arguments = TrainingArguments(
        output_dir=str(OUT / method),
        max_steps=N_STEPS,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=64,
        learning_rate=lr,
        lr_scheduler_type="cosine",
        weight_decay=0.0,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        seed=0,
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
    )
    trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    scores = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    cost = calibration.facts.seconds if method != "LoRA" else 0.0
    return Run(losses, {k: scores[k] for k in ("accuracy", "macro_f1")}, cost, seconds), trainer


def table(runs: dict[str, Run], rates: dict[str, float]) -> Table:
    """Results side by side."""
    rows = Table(title=f"{len(MODULES)}-way docstring classification, MiniLM, r=8, {N_STEPS} steps")
    rows.add_column("")
    for method in runs:
        rows.add_column(method, justify="right")

    def add(name: str, values: list[str]) -> None:
        rows.add_row(name, *values)

    add("learning rate", [f"{rates[m]:g}" for m in runs])
    add("calibration, s", [f"{r.calibration_seconds:.1f}" for r in runs.values()])
    add("training, s", [f"{r.seconds:.0f}" for r in runs.values()])
    for last in (10, 25, 50, 100, N_STEPS):
        first = max(1, last - 9)
        add(
            f"loss, steps {first}-{last}",
            [f"{r.mean_loss(first, last):.3f}" for r in runs.values()],
        )
    add("test accuracy", [f"{r.scores['accuracy']:.3f}" for r in runs.values()])
    add("test macro-F1", [f"{r.scores['macro_f1']:.3f}" for r in runs.values()])
    return rows


def reload_in_new_process(folder: Path) -> dict:
    """Evaluate the saved adapter where this package is never imported."""
    script = Path(__file__).with_name("reload_with_plain_peft.py")
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(OUT / "test")],
        check=True,
        capture_output=True,
        text=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def quickstart() -> None:
    """The comparison at each method's own learning rate."""
    data = load_task()
    console.print(f"{len(data['train'])} training and {len(data['test'])} test docstrings")
    calibration = measure(data)
    runs, trainers = {}, {}
    for method, lr in METHODS.items():
        console.print(f"training {method} at learning rate {lr:g} …")
        runs[method], trainers[method] = train(method, lr, data, calibration)
    folder = OUT / "adapter"
    tuned = trainers["LoRA-GA"].model
    tuned.save_pretrained(folder)
    data["test"].save_to_disk(OUT / "test")  # other imports could change the docstrings there
    console.print(tuned.base_model.init_report["default"].summary())
    console.print(table(runs, METHODS))
    picture = draw({m: r.losses for m, r in runs.items()}, calibration, OUT / "quickstart.png")
    results = {m: vars(r) for m, r in runs.items()}
    (OUT / "results.json").write_text(json.dumps(results, indent=1))
    reloaded = reload_in_new_process(folder)
    console.print(
        f"adapter saved to {folder}, picture to {picture}\n"
        f"loaded by plain PEFT {reloaded['peft']} in a new process (peft_gradinit imported: "
        f"{reloaded['plugin_imported']}): accuracy {reloaded['accuracy']:.3f}, live "
        f"{runs['LoRA-GA'].scores['accuracy']:.3f}"
    )
    if abs(reloaded["accuracy"] - runs["LoRA-GA"].scores["accuracy"]) > 1e-9:
        raise SystemExit("the reloaded adapter does not give the accuracy of the live one")


def sweep() -> None:
    """Final loss and accuracy of each method over the grid of learning rates."""
    data = load_task()
    calibration = measure(data)
    rows = Table(title="loss of the last 25 steps / test accuracy")
    rows.add_column("learning rate")
    for method in METHODS:
        rows.add_column(method, justify="right")
    for lr in GRID:
        cells = []
        for method in METHODS:
            run, _ = train(method, lr, data, calibration)
            cells.append(
                f"{run.mean_loss(N_STEPS - 24, N_STEPS):.3f} / {run.scores['accuracy']:.3f}"
            )
        rows.add_row(f"{lr:g}", *cells)
        console.print(f"{lr:g}", *cells)
    console.print(rows)


def main() -> None:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sweep", action="store_true", help="compare learning rates instead")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    OUT.mkdir(parents=True, exist_ok=True)
    sweep() if arguments.sweep else quickstart()


if __name__ == "__main__":
    main()
