"""One run: from the pretrained model to a JSON-able result."""

import hashlib
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace

import torch
from torch import nn
from transformers import PreTrainedModel, get_scheduler

from peft_gradinit import suggest_learning_rate

from .half import half_products
from .method import Method
from .methods import METHODS
from .pretraining import Rows
from .settings import Settings, Training
from .tasks import IGNORED, Task, fold, select, size

CALIBRATION_BATCH = 16
CHANGE_AT = 0.25
"""Share of the steps before a method's change."""
EVALUATION_BATCH = 64


@dataclass(frozen=True)
class Key:
    """What tells runs apart.

    Attributes:
        task: name.
        method: name.
        lr: learning rate.
        seed: of the order of the data, of the calibration data, of random factors and of dropout.
        steps: length of the run and of its schedule.
    """

    task: str
    method: str
    lr: float
    seed: int
    steps: int


def run(
    key: Key,
    task: Task,
    after: Callable[[nn.Module], None] | None = None,
    *,
    at_end_only: bool = False,
) -> dict:
    """Fine-tune once.

    Args:
        key: which run.
        task: that of `key.task`.
        after: gets the trained model, which it may change.
        at_end_only: evaluate once, on the test rows, which is all that a search for a rate needs. The
            run is the same.

    Returns:
        The key, the curve `[step, test loss, test accuracy]`, training losses, the loss on the
        pretraining distribution before and after, costs, the rate that the package suggests. A run that
        diverged has infinite losses.
    """
    of_seed = fold(task, key.seed)
    if at_end_only:
        settings = of_seed.settings
        once = {"training": settings.training.model_copy(update={"evaluations": 0})}
        of_seed = replace(of_seed, settings=settings.model_copy(update=once), source=None)
    model = of_seed.load_model()
    with half_products(model):
        result = _run(key, of_seed, model, after or (lambda trained: None))
    return {**result, "data": fingerprint(task)}


def _run(key: Key, task: Task, model: PreTrainedModel, after: Callable[[nn.Module], None]) -> dict:
    method, training = METHODS[key.method], task.settings.training
    before = source_loss(model, task)
    order = sample_order(size(task.train), training.batch_size * key.steps, key.seed)
    batches = calibration_batches(task, key.seed)
    torch.manual_seed(key.seed)  # here, since a task seeds the model that it loads
    started = time.perf_counter()
    adapted = method.start(model, task, batches)
    start_seconds = time.perf_counter() - started
    suggested = (
        suggest_learning_rate(adapted, optimizer=method.suggests).suggested
        if method.suggests
        else None
    )
    optimizer = method.optimizer(adapted, key.lr, training.head_rate(key.lr))

    def change() -> None:
        if method.change is not None:
            method.change(adapted, optimizer, task, batches)

    schedule = get_scheduler(
        method.schedule, optimizer, warmup_steps(training, key.steps), key.steps
    )
    torch.manual_seed(key.seed)  # the same dropout whatever a start draws
    curve, losses = train(adapted, optimizer, schedule, task, order.view(key.steps, -1), change)
    result = {
        **asdict(key),
        "curve": curve,
        "train_losses": losses,
        "source_loss": [before, source_loss(adapted, task)],
        "start_seconds": start_seconds,
        "suggested_lr": suggested,
        "start_steps": start_steps(method, task.settings),
        "device": next(adapted.parameters()).device.type,
        "n_trainable": sum(p.numel() for p in adapted.parameters() if p.requires_grad),
    }
    after(adapted)
    return result


def labels_per_step(task: Task) -> float:
    """The labels with loss of a step, on average over the training rows."""
    n_labels = int((task.train["labels"] != IGNORED).sum())
    return task.settings.training.batch_size * n_labels / size(task.train)


def fingerprint(task: Task) -> str:
    """What tells data apart: those of some tasks are read from what is installed."""
    digest = hashlib.sha256()
    for rows in (task.train, task.test):
        for name, values in sorted(rows.items()):
            digest.update(
                name.encode() + values.cpu().contiguous().view(torch.uint8).numpy().tobytes()
            )
    return digest.hexdigest()[:12]


def calibration_steps(settings: Settings) -> float:
    """How many training steps read as many rows as a calibration does."""
    return settings.n_calibration / settings.training.batch_size


def start_steps(method: Method, settings: Settings) -> float:
    """The steps that a method's calibration counts as."""
    return calibration_steps(settings) if method.reads_data else 0.0


def sample_order(n: int, n_samples: int, seed: int) -> torch.Tensor:
    """Epochs of shuffled rows, as many as are needed."""
    generator = torch.Generator().manual_seed(seed)
    epochs = math.ceil(n_samples / n)
    return torch.cat([torch.randperm(n, generator=generator) for _ in range(epochs)])[:n_samples]


def calibration_batches(task: Task, seed: int) -> list[Rows]:
    """Rows of the training data, drawn apart from the order of training."""
    generator = torch.Generator().manual_seed(10_000 + seed)
    chosen = torch.randperm(size(task.train), generator=generator)[: task.settings.n_calibration]
    return [select(task.train, part) for part in chosen.split(CALIBRATION_BATCH)]


def warmup_steps(training: Training, n_steps: int) -> int:
    """Of a run: those of the task, in proportion in a longer one; no more than a tenth of the run."""
    longer = max(1.0, n_steps / training.steps)
    return min(round(training.warmup_steps * longer), n_steps // 10)


def train(
    model: nn.Module,
    optimizer,
    schedule,
    task: Task,
    order: torch.Tensor,
    change: Callable[[], None],
):
    """Train, and return the curve and the training losses; `change` acts after a share of the steps."""
    training = task.settings.training
    n_steps = len(order)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    parts = range(1, training.evaluations + 1)
    marks = {n_steps} | {round(n_steps * i / training.evaluations) for i in parts}
    curve, losses = [[0, *evaluate(model, task.test)]] if parts else [], []
    model.train()
    for step, indices in enumerate(order, start=1):
        loss = model(**select(task.train, indices)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        del loss  # its graph remembers the shapes of the factors, which a change may cut
        if not math.isfinite(losses[-1]):
            curve.append([n_steps, math.inf, 0.0])
            break
        if step == round(n_steps * CHANGE_AT):
            change()
        if step in marks:
            curve.append([step, *evaluate(model, task.test)])
            model.train()
    return curve, losses


def source_loss(model: nn.Module, task: Task) -> float | None:
    """Loss on the pretraining distribution, with the classifier of the pretraining, if it is known."""
    if task.source is None:
        return None
    if task.source_head is None:
        return evaluate(model, task.source)[0]
    head = task.source_head
    classifier = next(m for n, m in model.named_modules() if n.endswith("classifier"))
    hook = classifier.register_forward_hook(lambda _, inputs, output: head(inputs[0]))
    try:
        return evaluate(model, task.source)[0]
    finally:
        hook.remove()


@torch.no_grad()
def evaluate(model: nn.Module, rows: Rows) -> tuple[float, float]:
    """Mean loss, and accuracy (of the next byte for language models)."""
    model.eval()
    loss, right, n = 0.0, 0, 0
    for part in torch.arange(size(rows)).split(EVALUATION_BATCH):
        batch = select(rows, part)
        output = model(**batch)
        logits, labels = output.logits, batch["labels"]
        if labels.ndim == 2:
            logits, labels = logits[:, :-1], labels[:, 1:]
        counted = labels != IGNORED
        right += int(((logits.argmax(-1) == labels) & counted).sum())
        loss += output.loss.item() * int(counted.sum())
        n += int(counted.sum())
    return loss / n, right / n
