"""The quickstart's task `functions`: SmolLM2 says in a sentence what a Python function does.

Plain LoRA and our start take the same steps over the same rows with the same trained numbers, each
at the learning rate that `suggest_learning_rate` gives. Prints what the calibration cost, the
validation loss by step, and what the base model and the adapters answer about three functions that
they have not seen. Draws the losses and where the ranks went. Loads the last adapter in a new
process with plain PEFT, where it must give the same answers.
"""

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from quickstart_progress import Clock
from reload_with_plain_peft import answer
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from peft_gradinit import (
    Calibration,
    EvaConfig,
    LoraGAConfig,
    LoraOneConfig,
    PiSSAConfig,
    init_report,
    suggest_learning_rate,
)
from peft_gradinit.analysis import draw_losses, draw_rank_map
from peft_gradinit.recipes import encode, load_model, load_processor, load_rows
from peft_gradinit.recipes.schema import DataSection, ModelSection

OUT = Path("out/quickstart")
MODEL = ModelSection(name="embedded:smollm2", dtype="float32")
N_STEPS, BATCH_SIZE = 16, 4
MAX_CHARACTERS, MAX_LENGTH = 160, 192  # of a source; of a chat, in tokens: all fit
N_CALIBRATION, N_VALIDATION, N_EVALUATIONS = 128, 32, 2
ADAPTER = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
BY_GRADIENT = {"rank_allocation": "gradient_energy", "budget": "parameters", "rho": 4}
METHODS: dict[str, Callable[..., PeftConfig]] = {
    "LoRA": lambda data: LoraConfig(**ADAPTER),
    "LoRA-One": lambda data: LoraOneConfig(**ADAPTER, **BY_GRADIENT, calibration=data),
    "LoRA-One, uniform ranks": lambda data: LoraOneConfig(**ADAPTER, calibration=data),
    "LoRA-GA": lambda data: LoraGAConfig(**ADAPTER, calibration=data),
    "EVA": lambda data: EvaConfig(**ADAPTER, calibration=data),
    "PiSSA": lambda data: PiSSAConfig(**ADAPTER),
}
COMPARED = ("LoRA", "LoRA-One")
console = Console()


@dataclass
class Run:
    """What one fine-tuning run gave.

    Attributes:
        rate: the suggested learning rate.
        n_trainable: trained numbers.
        start_seconds: `get_peft_model`, calibration included.
        start_bytes: extra peak memory of the calibration.
        seconds: training time, evaluations included.
        curve: `(step, validation loss)`.
        answers: to the functions shown.
    """

    rate: float
    n_trainable: int
    start_seconds: float
    start_bytes: int = 0
    seconds: float = 0.0
    curve: list[tuple[int, float]] = field(default_factory=list)
    answers: list[str] = field(default_factory=list)


@dataclass
class Data:
    """Rows of the task.

    Attributes:
        train: chats to train on, in the order of the seed.
        validation: chats to measure the loss on.
        shown: three chats of the test split.
        calibration: the first training chats as tokens and labels.
    """

    train: datasets.Dataset
    validation: datasets.Dataset
    shown: datasets.Dataset
    calibration: datasets.Dataset


def load_data(tokenizer: PreTrainedTokenizerBase, seed: int) -> Data:
    """Functions of the standard library and of installed packages, split by module."""
    section = DataSection(path="embedded:functions", max_length=MAX_LENGTH)
    train, held_out, test = (
        load_rows(section.model_copy(update={"split": split})).filter(_is_short)
        for split in ("train", "validation", "test")
    )
    train = train.shuffle(seed=seed)
    console.print(
        f"short functions with a docstring: {len(train):,} to train on, {len(held_out):,} for "
        f"validation, of other modules {len(test):,} to ask about"
    )
    chats = ["prompt", "completion"]
    first = train.select(range(N_CALIBRATION))
    return Data(
        train=train.select_columns(chats),
        validation=held_out.select(range(N_VALIDATION)).select_columns(chats),
        shown=test.select(range(3)),
        calibration=encode(first, section, "CAUSAL_LM", tokenizer),
    )


def _is_short(row: dict[str, Any]) -> bool:
    return len(row["source"]) <= MAX_CHARACTERS


def started(method: str, data: Data) -> tuple[PeftModel, Run]:
    """The model with the adapter's start, and what that took."""
    calibration = Calibration(data.calibration, progress=console.is_terminal)
    base = load_model(MODEL)
    begun = time.perf_counter()
    model = get_peft_model(base, METHODS[method](calibration))
    seconds = time.perf_counter() - begun
    report = init_report(model)
    facts = None if report is None else report.facts
    n_trainable, _ = model.get_nb_trainable_parameters()
    rate = suggest_learning_rate(model).suggested
    return model, Run(rate, n_trainable, seconds, 0 if facts is None else facts.peak_bytes)


def train(
    model: PeftModel, run: Run, data: Data, tokenizer: Any, n_steps: int, seed: int, clock: Clock
) -> None:
    """One run of TRL's `SFTTrainer`; the loss is that of the answers."""
    arguments = SFTConfig(
        output_dir=str(OUT / "trainer"),
        max_steps=n_steps,
        per_device_train_batch_size=BATCH_SIZE,
        per_device_eval_batch_size=8,
        learning_rate=run.rate,
        lr_scheduler_type="linear",
        max_length=MAX_LENGTH,
        eval_strategy="steps",
        eval_on_start=True,
        eval_steps=max(1, n_steps // N_EVALUATIONS),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        gradient_checkpointing=False,
        bf16=False,
        seed=seed,
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=data.train,
        eval_dataset=data.validation,
        processing_class=tokenizer,
        callbacks=[clock],
    )
    trainer.remove_callback(PrinterCallback)
    begun = time.perf_counter()
    trainer.train()
    run.seconds = time.perf_counter() - begun
    run.curve = [
        (entry["step"], entry["eval_loss"])
        for entry in trainer.state.log_history
        if "eval_loss" in entry
    ]


def answers(model: PreTrainedModel | PeftModel, tokenizer: Any, data: Data) -> list[str]:
    """What the model says about the functions shown."""
    return [answer(model, tokenizer, row["prompt"]) for row in data.shown]


def table(runs: dict[str, Run]) -> Table:
    """Results side by side."""
    rows = Table(title="SmolLM2-135M, validation loss of the answers")
    rows.add_column("")
    for method in runs:
        rows.add_column(method, justify="right")

    def add(name: str, cells: list[str]) -> None:
        rows.add_row(name, *cells)

    of = runs.values()
    add("suggested learning rate", [f"{r.rate:.2g}" for r in of])
    add("trained numbers", [f"{r.n_trainable:,}" for r in of])
    add("calibration and start", [f"{r.start_seconds:.0f} s" for r in of])
    add("its memory", [f"{r.start_bytes / 2**20:.0f} MiB" for r in of])
    add("training", [f"{r.seconds:.0f} s" for r in of])
    for i, (step, _) in enumerate(next(iter(of)).curve):
        add(f"loss after {step} steps", [f"{r.curve[i][1]:.3f}" for r in of])
    return rows


def show_answers(base: list[str], runs: dict[str, Run], data: Data) -> None:
    """The functions with a sentence of every model."""
    for i, row in enumerate(data.shown):
        console.print(f"\n{row['source']}", style="cyan", highlight=False)
        said = {"base model": base[i], **{method: run.answers[i] for method, run in runs.items()}}
        said["docstring"] = row["completion"][0]["content"]
        for who, sentence in said.items():
            console.print(f"  [bold]{who}[/bold]: ", end="")
            console.print(sentence, markup=False, highlight=False)


def check_reload(folder: Path, run: Run, data: Data) -> None:
    """Load the adapter with plain PEFT in a new process; its answers must be the same."""
    prompts = OUT / "prompts.json"
    prompts.write_text(json.dumps([row["prompt"] for row in data.shown]))
    script = Path(__file__).with_name("reload_with_plain_peft.py")
    command = [sys.executable, str(script), "--prompts", str(prompts), str(folder)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    found = json.loads(done.stdout.splitlines()[-1])
    same = found["answers"] == run.answers and not found["plugin_imported"]
    said = "the same answers" if same else "OTHER ANSWERS"
    console.print(f"\n{folder}, loaded by plain PEFT {found['peft']} in a new process: {said}")
    if not same:
        raise SystemExit(f"the reloaded adapter is not the live one: {found}")


def run(arguments: argparse.Namespace) -> None:
    """The comparison."""
    datasets.disable_progress_bars()
    OUT.mkdir(parents=True, exist_ok=True)
    methods, n_steps = list(arguments.methods or COMPARED), arguments.steps or N_STEPS
    console.print("loading SmolLM2 (the first time, half a minute to unpack it) …")
    tokenizer = load_processor(MODEL)
    data = load_data(tokenizer, arguments.seed)
    base = answers(load_model(MODEL), tokenizer, data)
    runs: dict[str, Run] = {}
    with Clock(console, len(methods) * n_steps) as clock:
        for method in methods:
            clock.say(f"{method}: start")
            torch.manual_seed(arguments.seed)
            model, runs[method] = started(method, data)
            clock.say(f"{method}: {n_steps} steps at {runs[method].rate:.2g}")
            train(model, runs[method], data, tokenizer, n_steps, arguments.seed, clock)
            runs[method].answers = answers(model, tokenizer, data)
            model.save_pretrained(OUT / method)
            report = init_report(model)
    console.print(table(runs))
    show_answers(base, runs, data)
    curves = {method: run.curve for method, run in runs.items()}
    pictures = [draw_losses(curves, OUT / "quickstart.png", label="validation loss")]
    if report is not None:
        pictures.append(draw_rank_map(report.ranks(), OUT / "ranks.png"))
    results = {method: asdict(run) for method, run in runs.items()}
    (OUT / "results.json").write_text(json.dumps(results, indent=1))
    check_reload(OUT / methods[-1], runs[methods[-1]], data)
    console.print("pictures: " + ", ".join(map(str, pictures)))
