"""What a row of the comparison is."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from peft_gradinit import Calibration, with_output_layer

from .pretraining import Rows
from .tasks import Task

Start = Callable[[PreTrainedModel, Task, list[Rows]], nn.Module]
Steps = Callable[[nn.Module, float, float], torch.optim.Optimizer]
"""`(model, learning rate of the adapter, of the head)`."""
Change = Callable[[nn.Module, torch.optim.Optimizer, Task, list[Rows]], None]
"""Of a model and the state of its optimiser, in the middle of a run."""


HEADS = ("classifier", "score")
"""Names of the new heads of tasks."""
EQUAL_NUMBERS = {
    "rank_allocation": "gradient_energy",
    "rho": 4.0,
    "budget": "parameters",
    "use_rslora": False,
}
"""Options of ranks by gradient, with as many trained numbers as LoRA has."""


def adamw(model: nn.Module, lr: float, head_lr: float) -> torch.optim.Optimizer:
    """AdamW without weight decay; heads have a rate of their own."""
    head, rest = head_and_rest(model)
    groups = [{"params": rest, "lr": lr}, {"params": head, "lr": head_lr}]
    return torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)


def head_and_rest(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """What is trained: a classifier, and all else."""
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    head = [p for n, p in trained if any(word in n for word in HEADS)]
    return head, [p for n, p in trained if not any(word in n for word in HEADS)]


def adapter_of(task: Task, **options: Any) -> dict[str, Any]:
    """Options of PEFT's configs: those of the task, and scaled as rsLoRA does unless `options` say otherwise."""
    return {**task.settings.adapter, **task.adapter, "use_rslora": True, **options}


def plain(**options: Any) -> Start:
    """PEFT's LoRA; `options` are those of `LoraConfig`."""

    def start(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
        del batches
        return get_peft_model(model, LoraConfig(**adapter_of(task, **options)))

    return start


def calibrated(config: type[PeftConfig], **options: Any) -> Start:
    """One of our types with a calibration."""

    def start(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
        calibration = Calibration(batches, progress=False, max_tokens=None)
        return get_peft_model(model, config(**adapter_of(task, **options), calibration=calibration))

    return start


def with_output(model: PreTrainedModel, task: Task, batches: list[Rows]) -> nn.Module:
    """PEFT's LoRA with a rank less, whose numbers go to the output layer; tied layers stay tied."""
    del batches
    config = LoraConfig(**adapter_of(task, use_rslora=False))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Model has `tie_word_embeddings=True`")
        return get_peft_model(model, with_output_layer(model, config))


@dataclass(frozen=True)
class Method:
    """A row of the comparison.

    Attributes:
        title: for people.
        start: makes the model ready; its time is the method's start.
        first_rate: where the search for the learning rate begins.
        optimizer: makes the optimiser.
        reads_data: calibration batches count as steps.
        ours: one of this package's types.
        suggests: the optimiser for which the package is asked for a learning rate, if it knows one.
        has_output: adapts the output layer, which language models alone have.
        change: made after a quarter of the steps.
        schedule: of the rates, by the name that Transformers has for it.
    """

    title: str
    start: Start
    first_rate: float
    optimizer: Steps = adamw
    reads_data: bool = False
    ours: bool = False
    suggests: str | None = None
    has_output: bool = False
    change: Change | None = None
    schedule: str = "cosine"
