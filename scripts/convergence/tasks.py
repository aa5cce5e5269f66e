"""Tasks with a pretrained model and real data, nothing downloaded; and those of recipes.

A task is a model, rows to train and test on, and rows of what the model was pretrained on, to see
what it forgets.
"""

import pydoc_data.topics
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from minilm_task import load_model, load_task
from sklearn.datasets import load_digits
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    ViTConfig,
    ViTForImageClassification,
)

from peft_gradinit.recipes import Reader, load_processor, load_recipe, load_rows
from peft_gradinit.recipes import load_model as load_model_of
from peft_gradinit.recipes.collation import collator
from peft_gradinit.recipes.schema import DataSection, ModelSection

from .pretraining import Rows, pretrained
from .settings import Settings

LENGTH = 128  # bytes of a sequence
MAX_TOKENS = 32  # of a docstring
IGNORED = -100
"""Label of tokens that carry no loss."""
SEED_OF_LABELS = 5
PADDING = {"input_ids": 0, "attention_mask": 0}


@dataclass(frozen=True)
class Task:
    """What a run needs.

    Attributes:
        title: for people.
        load_model: a fresh copy of the pretrained model; a new head is the same every time.
        train: rows to train on, `labels` among them.
        test: rows to test on.
        source: rows of the pretraining distribution that the model has not seen, if known.
        source_head: the classifier of the pretraining, if the task has another.
        settings: the task's file.
        adapter: `target_modules`, `task_type` and `modules_to_save` for PEFT.
    """

    title: str
    load_model: Callable[[], PreTrainedModel]
    train: Rows
    test: Rows
    source: Rows | None
    settings: Settings
    adapter: dict[str, object] = field(default_factory=dict)
    source_head: nn.Module | None = None


def docstrings(settings: Settings) -> Task:
    """MiniLM; which of 20 modules a docstring is from."""
    data = load_task(settings.n_test, distinct=settings.distinct_texts)
    return Task(
        title="MiniLM (22 M): module of a docstring",
        load_model=load_model,
        train=_padded(data["train"]),
        test=_padded(data["test"]),
        source=None,  # its contrastive loss and data are not published with it
        settings=settings,
        adapter={"target_modules": "all-linear", "task_type": "SEQ_CLS"},
    )


def topics(settings: Settings) -> Task:
    """A byte-level causal LM of Python source; prose about Python."""
    code, held_out = map(_as_bytes, _source())
    folder = pretrained(
        settings.pretraining,
        lambda options: LlamaForCausalLM(LlamaConfig(vocab_size=256, use_cache=False, **options)),
        lambda n, generator: _windows(code, n, generator),
    )
    prose = _as_bytes("\n".join(pydoc_data.topics.topics.values()))
    cut = len(prose) * 9 // 10
    return Task(
        title="Llama-shaped LM (1.9 M) of Python source: prose of its documentation",
        load_model=lambda: LlamaForCausalLM.from_pretrained(folder),
        train=_consecutive(prose[:cut]),
        test=_spread(_consecutive(prose[cut:]), settings.n_test),
        source=_spread(_consecutive(held_out), settings.n_test),
        settings=settings,
        adapter={"target_modules": "all-linear", "task_type": "CAUSAL_LM"},
    )


def digits(settings: Settings) -> Task:
    """A ViT of odd digits; even digits."""
    data = load_digits()
    images = torch.tensor(data.images, dtype=torch.float32)[:, None] / 8 - 1
    labels = torch.tensor(data.target)
    odd, even = (
        {"pixel_values": images[labels % 2 == parity], "labels": labels[labels % 2 == parity]}
        for parity in (1, 0)
    )
    odd_train, odd_test = _split(odd, settings.n_test // 2)
    train, test = _split(even, settings.n_test)

    def draw(n: int, generator: torch.Generator) -> Rows:
        return _rows(odd_train, torch.randint(len(odd_train["labels"]), (n,), generator=generator))

    folder = pretrained(
        settings.pretraining,
        lambda options: ViTForImageClassification(ViTConfig(**options)),
        draw,
    )

    def load() -> ViTForImageClassification:
        model = ViTForImageClassification.from_pretrained(folder)
        torch.manual_seed(0)
        model.classifier.reset_parameters()  # the old one is sure that no digit is even
        return model

    return Task(
        title="ViT (0.2 M) of odd digits: even digits",
        load_model=load,
        train=train,
        test=test,
        source=odd_test,
        source_head=ViTForImageClassification.from_pretrained(folder).classifier,
        settings=settings,
        adapter={
            "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "fc1", "fc2"],
            "modules_to_save": ["classifier"],
        },
    )


def of_recipe(settings: Settings) -> Task:
    """The model and the data of a recipe, which may be on a hub."""
    if settings.recipe is None:
        raise SystemExit("'task: recipe' needs 'recipe: FILE', one of configs/ or of your own")
    recipe = load_recipe(settings.recipe)
    held_out = load_rows(recipe.data, evaluation=True)
    task = _read(recipe.model, recipe.data, held_out, recipe.title, settings)
    return replace(task, adapter={**task.adapter, "target_modules": recipe.method.target_modules})


def functions(settings: Settings) -> Task:
    """SmolLM2; the first sentence of a function's docstring, from its source."""
    return _smollm2("embedded:functions", "sentence about a function", settings)


def reference(settings: Settings) -> Task:
    """SmolLM2; prose of the language reference."""
    return _smollm2("embedded:reference", "prose of the language reference", settings)


def _smollm2(path: str, title: str, settings: Settings) -> Task:
    length = settings.max_length
    section = DataSection(path=path, max_length=length, drop_longer=path == "embedded:functions")
    held_out = load_rows(section.model_copy(update={"split": "test"}))
    model = ModelSection(name="embedded:smollm2", dtype="bfloat16")
    task = _read(model, section, held_out, f"SmolLM2 (135 M): {title}", settings)
    return replace(
        task,
        test=_spread(task.test, settings.n_test),
        source=_spread(_source_in_tokens(model, length), settings.n_test),
    )


def _source_in_tokens(model: ModelSection, length: int) -> Rows:
    """Python source, a part of what SmolLM2 was pretrained on."""
    _, text = _source()
    ids = load_processor(model)(text, verbose=False)["input_ids"]
    return _consecutive(torch.tensor(ids), length)


def _read(
    model: ModelSection, data: DataSection, held_out: Any, title: str, settings: Settings
) -> Task:
    """A task of a model and data as recipes describe them."""
    rows = load_rows(data)
    reader = Reader.of(model, data, rows)

    def as_one_batch(some: Any) -> Rows:
        return collator(reader.processor)(list(reader.encode(some)))

    def load() -> PreTrainedModel:
        torch.manual_seed(0)
        return load_model_of(model, reader.labels)

    return Task(
        title=title,
        load_model=load,
        train=as_one_batch(rows),
        test=as_one_batch(held_out),
        source=None,
        settings=settings,
        adapter={"target_modules": "all-linear", "task_type": reader.task},
    )


TASKS: dict[str, Callable[[Settings], Task]] = {
    "recipe": of_recipe,
    "docstrings": docstrings,
    "topics": topics,
    "digits": digits,
    "functions": functions,
    "reference": reference,
}


def fold(task: Task, seed: int) -> Task:
    """The task of a seed: with folds, the next seed is tested on other rows, and trained on the rest."""
    n = task.settings.folds
    if n == 1:
        return task
    rows = {name: torch.cat([task.test[name], task.train[name]]) for name in task.train}
    of_fold = torch.arange(size(rows)) % n == seed % n
    train, test = (_rows(rows, part.nonzero().squeeze(1)) for part in (~of_fold, of_fold))
    return replace(task, train=train, test=test)


def with_few_labels(task: Task) -> Task:
    """The task with the loss of `labels_per_row` tokens of each training row, drawn, if it asks for that."""
    n = task.settings.labels_per_row
    if n is None:
        return task
    labels = task.train["labels"]
    drawn = torch.rand(labels.shape, generator=torch.Generator().manual_seed(SEED_OF_LABELS))
    drawn[:, 0] = -1  # no model predicts the first
    least = drawn.topk(n, dim=1).values[:, -1:]
    return replace(task, train={**task.train, "labels": labels.masked_fill(drawn < least, IGNORED)})


def on_device(task: Task, device: str) -> Task:
    """The task with its rows and models there."""

    def moved(rows: Rows) -> Rows:
        return {name: column.to(device) for name, column in rows.items()}

    return replace(
        task,
        load_model=lambda: task.load_model().to(device),
        train=moved(task.train),
        test=moved(task.test),
        source=None if task.source is None else moved(task.source),
        source_head=None if task.source_head is None else task.source_head.to(device),
    )


def size(rows: Rows) -> int:
    """How many rows."""
    return len(rows["labels"])


def select(rows: Rows, indices: Tensor) -> Rows:
    """A batch; columns that are all padding are cut off."""
    batch = _rows(rows, indices)
    if "attention_mask" not in batch:
        return batch
    padded = batch["attention_mask"].shape
    longest = int(batch["attention_mask"].sum(1).max())
    return {
        n: column[:, :longest] if column.shape == padded else column for n, column in batch.items()
    }


def _rows(rows: Rows, indices: Tensor) -> Rows:
    return {name: column[indices.to(column.device)] for name, column in rows.items()}


def _split(rows: Rows, n_test: int) -> tuple[Rows, Rows]:
    order = torch.randperm(size(rows), generator=torch.Generator().manual_seed(0))
    return _rows(rows, order[n_test:]), _rows(rows, order[:n_test])


def _padded(data) -> Rows:
    rows = {"labels": torch.tensor(data["labels"])}
    for name, value in PADDING.items():
        padded = torch.full((len(data), MAX_TOKENS), value)
        for row, ids in zip(padded, data[name], strict=True):
            row[: len(ids[:MAX_TOKENS])] = torch.tensor(ids[:MAX_TOKENS])
        rows[name] = padded
    return rows


def _source() -> tuple[str, str]:
    """The standard library's source: every tenth file is held out."""
    root = Path(sysconfig.get_paths()["stdlib"])
    left_out = {"site-packages", "test", "tests", "idle_test", "lib2to3", "pydoc_data"}
    files = sorted(p for p in root.rglob("*.py") if not left_out & set(p.relative_to(root).parts))
    code, held_out = (
        "\n".join(p.read_text(encoding="utf-8", errors="replace") for p in chosen)
        for chosen in ([p for i, p in enumerate(files) if i % 10], files[::10])
    )
    return code, held_out


def _as_bytes(text: str) -> Tensor:
    return torch.frombuffer(bytearray(text.encode()), dtype=torch.uint8)


def _windows(text: Tensor, n: int, generator: torch.Generator) -> Rows:
    starts = torch.randint(len(text) - LENGTH, (n,), generator=generator)
    ids = torch.stack([text[i : i + LENGTH] for i in starts.tolist()]).long()
    return {"input_ids": ids, "labels": ids}


def _consecutive(text: Tensor, length: int = LENGTH) -> Rows:
    ids = text[: len(text) // length * length].view(-1, length).long()
    return {"input_ids": ids, "labels": ids}


def _spread(rows: Rows, n: int) -> Rows:
    """`n` rows at equal distances."""
    return _rows(rows, torch.linspace(0, size(rows) - 1, n).long())
