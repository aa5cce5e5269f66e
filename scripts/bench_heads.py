"""What a new head gains from a learning rate of its own, with `Trainer` and plain LoRA of PEFT.

    python scripts/bench_heads.py run [TASK …]   # what is missing, into out/heads
    python scripts/bench_heads.py publish        # scripts/convergence/measured/heads/: heads.json and heads.md

The adapter trains at its suggested rate, with `Trainer`'s own schedule. The head trains at the adapter's
rate, at that of `CalibrationCallback(head_learning_rate="suggested")`, and at multiples of it. The aim was
written down before (`scripts/convergence/AIMS.md`, l).
"""

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path

import torch
from convergence.pretraining import BASES
from convergence.report import difference, interval
from convergence.settings import load_settings
from convergence.study import load_task, prepare_process
from convergence.tasks import LENGTH, Task, fold, select, size
from minilm_task import MODULES, docstrings, load_model
from peft import LoraConfig, get_peft_model
from rich.console import Console
from transformers import (
    LlamaForSequenceClassification,
    Trainer,
    TrainingArguments,
    set_seed,
)

from peft_gradinit import CalibrationCallback
from peft_gradinit.files import write_json

RESULTS = Path("out/heads")
MEASURED = Path(__file__).parent / "convergence" / "measured" / "heads"
SUGGESTED, OF_ADAPTER = "suggested", "adapter"
N_TEST = 240


@dataclass(frozen=True)
class Plan:
    """How a task is trained.

    Attributes:
        title: for people.
        steps: of training.
        batch_size: rows of a step.
        seeds: that are reported.
        multiples: of the suggested rate that are run as well.
    """

    title: str
    steps: int
    batch_size: int
    seeds: range
    multiples: tuple[float, ...] = ()


PLANS = {
    "bytes": Plan(
        "byte-level Llama (1.9 M), docstrings", 150, 16, range(1, 6), (0.25, 0.5, 2.0, 4.0)
    ),
    "docstrings": Plan("MiniLM (22 M), docstrings", 84, 16, range(1, 4)),
    "two_classes": Plan("MiniLM (22 M), docstrings in two classes", 84, 16, range(1, 6)),
    "digits": Plan("ViT (0.2 M), digits", 154, 32, range(1, 4)),
    "smollm2": Plan("SmolLM2 (135 M), docstrings", 40, 16, range(1, 4)),
}


@dataclass(frozen=True)
class Result:
    """What a run ended with."""

    loss: float
    head_rate: float
    rate: float


Results = dict[str, dict[str, list[Result]]]
"""By task, and by what rate the head has: one of every seed."""


@cache
def task_of(name: str) -> Task:
    """The task; `bytes`, `smollm2` and `two_classes` are no tasks of the study."""
    if name == "smollm2":
        variants = Path(__file__).parent / "convergence" / "configs" / "variants"
        return load_task(str(variants / "heads_smollm2.yaml"))
    own = {"bytes": _of_bytes, "two_classes": _of_two_classes}
    return own[name]() if name in own else load_task(name)


def _of_two_classes() -> Task:
    """`docstrings`, where every other module is of one class."""
    task = load_task("docstrings")
    train, test = ({**rows, "labels": rows["labels"] % 2} for rows in (task.train, task.test))
    return replace(
        task, train=train, test=test, load_model=lambda: load_model(classes=["even", "odd"])
    )


def _of_bytes() -> Task:
    """The model of `topics` with a new head, and docstrings as bytes."""
    settings, folder = load_settings("topics"), BASES / "topics"
    named = [(text, i) for i, module in enumerate(MODULES) for text in docstrings(module)]
    random.Random(0).shuffle(named)
    ids = torch.zeros(len(named), LENGTH, dtype=torch.long)
    for row, (text, _) in zip(ids, named, strict=True):
        written = torch.tensor(list(text.encode()[:LENGTH]))
        row[: len(written)] = written
    rows = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "labels": torch.tensor([label for _, label in named]),
    }
    test, train = (
        {name: column[part] for name, column in rows.items()}
        for part in (slice(N_TEST), slice(N_TEST, None))
    )

    def load() -> LlamaForSequenceClassification:
        torch.manual_seed(0)
        return LlamaForSequenceClassification.from_pretrained(
            folder, num_labels=len(MODULES), pad_token_id=0
        )

    adapter = {"target_modules": "all-linear", "task_type": "SEQ_CLS"}
    return Task("bytes", load, train, test, None, settings, adapter)


def run(name: str, head_rate: float | str | None, seed: int) -> Result:
    """Train with one rate for the head, and evaluate."""
    task, plan = fold(task_of(name), seed), PLANS[name]
    set_seed(seed)
    model = task.load_model()
    set_seed(seed)
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, **task.adapter))
    rows = {"train": task.train, "test": task.test}

    def collate(some: list[tuple[str, int]]) -> dict:
        return select(rows[some[0][0]], torch.tensor([i for _, i in some]))

    arguments = TrainingArguments(
        str(RESULTS / "trainer"),
        max_steps=plan.steps,
        per_device_train_batch_size=plan.batch_size,
        per_device_eval_batch_size=48,
        seed=seed,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=torch.cuda.is_available(),
        label_names=["labels"],
    )
    trainer = Trainer(
        model,
        arguments,
        collate,
        [("train", i) for i in range(size(task.train))],
        [("test", i) for i in range(size(task.test))],
    )
    callback = CalibrationCallback(trainer, learning_rate="suggested", head_learning_rate=head_rate)
    trainer.add_callback(callback)
    trainer.train()
    rate = trainer.args.learning_rate
    others = {group["initial_lr"] for group in trainer.optimizer.param_groups} - {rate}
    return Result(trainer.evaluate()["eval_loss"], next(iter(others), rate), rate)


def path_of(name: str, what: str, seed: int) -> Path:
    """Where a run's result lies."""
    return RESULTS / name / f"{what}_{seed}.json"


def result_of(name: str, what: str, seed: int) -> Result | None:
    """A run's result, if it is there."""
    path = path_of(name, what, seed)
    return Result(**json.loads(path.read_text())) if path.exists() else None


def pending(name: str) -> Iterator[tuple[str, int]]:
    """The runs that are missing; the suggested ones first, since multiples need them."""
    whats = [SUGGESTED, OF_ADAPTER, *(f"{m:g}" for m in PLANS[name].multiples)]
    for what in whats:
        for seed in PLANS[name].seeds:
            if result_of(name, what, seed) is None:
                yield what, seed


def carry_out(names: list[str]) -> None:
    """Run what is missing."""
    prepare_process()
    for name in names:
        for what, seed in pending(name):
            found = result_of(name, SUGGESTED, seed)
            if what == OF_ADAPTER and found is not None and found.head_rate == found.rate:
                result = found  # the same run
            else:
                result = run(name, head_rate_of(what, found), seed)
            write_json(path_of(name, what, seed), asdict(result))
            Console().print(f"{name} {what} seed {seed}: {result}")


def head_rate_of(what: str, found: Result | None) -> float | str | None:
    """What the callback is given; multiples are of the rate that was found."""
    if what in (SUGGESTED, OF_ADAPTER) or found is None:
        return None if what == OF_ADAPTER else SUGGESTED
    return float(what) * found.head_rate


def table(results: Results) -> str:
    """The losses of all tasks, next to the head at the adapter's rate."""
    lines = [
        "| task | head | rate of the head | loss | next to the adapter's rate |",
        "|---" * 5 + "|",
    ]
    for name, by_rate in results.items():
        usual = [result.loss for result in by_rate[OF_ADAPTER]]
        for what, found in by_rate.items():
            losses = [result.loss for result in found]
            beside = "" if what == OF_ADAPTER else difference(losses, usual)
            rate = sum(result.head_rate for result in found) / len(found)
            title = {SUGGESTED: "suggested", OF_ADAPTER: "adapter's rate"}.get(
                what, f"{what} times that"
            )
            lines.append(
                f"| {PLANS[name].title} | {title} | {rate:.1e} | {interval(losses)} | {beside} |"
            )
    return "\n".join(lines)


def collected() -> Results:
    """The results of all seeds, where all are there."""
    results: Results = {}
    for name, plan in PLANS.items():
        for what in (OF_ADAPTER, SUGGESTED, *(f"{m:g}" for m in plan.multiples)):
            found = [result_of(name, what, seed) for seed in plan.seeds]
            known = [result for result in found if result is not None]
            if len(known) == len(plan.seeds):
                results.setdefault(name, {})[what] = known
    return results


def published() -> Results:
    """The results that are in the repository."""
    kept = json.loads((MEASURED / "heads.json").read_text())
    return {
        name: {
            what: [Result(**r) for r in kept[name][what]] for what in sorted(kept[name], key=_order)
        }
        for name in PLANS
        if name in kept
    }


def _order(what: str) -> float:
    return {OF_ADAPTER: -2.0, SUGGESTED: -1.0}.get(what) or float(what)


def publish() -> None:
    """Write the results and their table."""
    MEASURED.mkdir(parents=True, exist_ok=True)
    found = collected()
    kept = {n: {w: [asdict(r) for r in runs] for w, runs in b.items()} for n, b in found.items()}
    write_json(MEASURED / "heads.json", kept)
    text = table(published())
    (MEASURED / "heads.md").write_text(text + "\n")
    Console().print(text, soft_wrap=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    running = commands.add_parser("run")
    running.add_argument("tasks", nargs="*", metavar="TASK", default=list(PLANS))
    commands.add_parser("publish")
    options = parser.parse_args()
    if options.command == "run":
        carry_out(options.tasks)
    else:
        publish()
