"""What a trained model is worth: its loss, its classes, or the answers that it generates."""

import re
from typing import Any, Literal, cast

import torch
from accelerate.utils import gather_object
from torch import nn
from transformers import EvalPrediction, Trainer, TrainingArguments

from ..errors import ConfigError, DataError, warn
from ..layouts import process_state
from .data_section import DataSection
from .encoding import Encoder
from .labels import Numbers
from .lengths import table_length
from .metrics import check_metrics, compute, names_given
from .models import empty_model
from .reading import Reader
from .rows import Rows, columns_of
from .schema import Recipe
from .sections import CLASSIFIED, Task, nearest

_THOUSANDS = re.compile(r"(?<=\d),(?=\d{3}(?!\d))")
"""Commas of thousands: `1,000` and `1,234,567`, not `(1,2)`."""
_SPEEDS = ("runtime", "samples_per_second", "steps_per_second")
"""What evaluations of every trainer give besides."""


def check_evaluation(
    recipe: Recipe, reader: Reader, rows: Rows | None, arguments: TrainingArguments
) -> None:
    """Refuse an evaluation that could not be done, before anything is trained.

    Args:
        recipe: which metrics.
        reader: of the rows.
        rows: the evaluation rows as they are in the dataset; `None` if there are none.
        arguments: of the trainer, which can ask for an evaluation in training.

    Raises:
        ConfigError: if there is nothing to evaluate on, a metric is unknown or is not for what
            the model gives, metrics are asked for without predictions or generation, or the
            best checkpoint is to be chosen by what is not measured in training.
        DataError: if a row has no answer to compare with.
    """
    asked = recipe.evaluation
    in_training = getattr(arguments.eval_strategy, "value", arguments.eval_strategy)
    if rows is None and (asked.metrics or asked.steps or in_training != "no"):
        raise ConfigError(
            f"evaluation asks for metrics={asked.metrics} and steps={asked.steps}, and training for "
            f"eval_strategy={in_training!r}, but there is nothing to evaluate on; set data.eval_split "
            "or data.n_eval."
        )
    if reader.task == "PREFERENCE" and asked.metrics:
        raise ConfigError(
            f"evaluation.metrics={asked.metrics}, but preferences are measured by their loss and "
            "their rewards; leave them out."
        )
    if reader.task in CLASSIFIED and asked.metrics and arguments.prediction_loss_only:
        raise ConfigError(
            f"evaluation.metrics={asked.metrics} need predictions, but training.prediction_loss_only is "
            "true; leave one of them out."
        )
    check_metrics(asked.metrics, _kind(reader))
    if in_training != "no":
        _check_best(arguments.metric_for_best_model, asked.metrics, reader.task)
    if rows is None or reader.task in CLASSIFIED or not asked.metrics:
        return
    if asked.max_new_tokens is None:
        raise ConfigError(
            f"evaluation.metrics={asked.metrics} of a language model compare generated answers; set "
            "evaluation.max_new_tokens."
        )
    _check_room(recipe, reader, asked.max_new_tokens)
    encoder = Encoder(reader.section, reader.task, reader.processor, columns_of(rows))
    for row in rows.take(1):
        first = cast("dict[str, Any]", row)
        encoder.prompt(first)
        encoder.completion(first)
    if asked.answer is not None:
        _check_answers(encoder, rows, asked.answer)


def _check_answers(encoder: Encoder, rows: Rows, pattern: str) -> None:
    for i, row in enumerate(rows):
        reference = encoder.completion(cast("dict[str, Any]", row))
        if reference is not None and not answer_of(reference, pattern):
            raise DataError(
                f"evaluation.answer={pattern!r} finds no answer in row {i} of the evaluation data, "
                f"{reference[:80]!r}; mend the expression, or leave such rows out by "
                "data.completion_keep."
            )


def _kind(reader: Reader) -> Literal["classes", "texts", "numbers"]:
    if reader.task not in CLASSIFIED:
        return "texts"
    return "numbers" if isinstance(reader.labels, Numbers) else "classes"


def _check_best(asked: str | None, metrics: list[str], task: Task) -> None:
    """Refuse a metric for the best checkpoint that no evaluation in training gives.

    Args:
        asked: `metric_for_best_model`.
        metrics: those of the evaluation.
        task: what the model is for; the trainers of TRL give more, which is not known here.

    Raises:
        ConfigError: if it is known that there is none.
    """
    if asked is None:
        return
    name, classified = asked.removeprefix("eval_"), task in CLASSIFIED
    own = names_given(metrics) if classified else []
    if own is None or (task in ("CAUSAL_LM", "PREFERENCE") and name not in metrics):
        return
    given = ["loss", *own]
    if name not in {*given, *_SPEEDS}:
        why = (
            "add it to evaluation.metrics" if classified else "others are measured at the end alone"
        )
        raise ConfigError(
            f"training.metric_for_best_model={asked!r} is not measured in training, but {given} are"
            f"{nearest(name, given)}; name one of these{' or ' if classified else ', since '}{why}."
        )


def _check_room(recipe: Recipe, reader: Reader, n_new: int) -> None:
    if reader.task != "CAUSAL_LM":
        return
    table, length = table_length(empty_model(recipe.model)), reader.section.length
    if table is not None and length + n_new > table:
        raise ConfigError(
            f"a prompt of max_length={length} tokens and max_new_tokens={n_new} do not fit into the "
            f"{table} positions of {recipe.model.name!r}; set data.max_length to "
            f"{max(1, table - n_new)} or less, or evaluation.max_new_tokens to less."
        )


def evaluate_model(
    trainer: Trainer, recipe: Recipe, reader: Reader, rows: Rows
) -> dict[str, float]:
    """Measure the trainer's model on its evaluation rows.

    Args:
        trainer: with its encoded evaluation data; its model is evaluated.
        recipe: which metrics.
        reader: of the rows.
        rows: the evaluation rows as they are in the dataset.

    Returns:
        `loss` and the metrics.
    """
    scores = {k.removeprefix("eval_"): v for k, v in trainer.evaluate().items()}
    kept = {"loss": float(scores["loss"])}
    metrics, task = recipe.evaluation.metrics, reader.task
    if task in CLASSIFIED:
        computed: Any = trainer.compute_metrics
        names = computed.given if metrics else ()
        return kept | {f"metric_{name}": float(scores[name]) for name in names}
    if task == "PREFERENCE":
        return kept | {k: float(v) for k, v in scores.items() if k.startswith("rewards/")}
    if metrics:
        encoder = Encoder(reader.section, task, reader.processor, columns_of(rows))
        model: Any = trainer.accelerator.unwrap_model(trainer.model)
        answers = _answers(model, recipe, task, list(rows), encoder)
        kept |= compute(metrics, *answers)
    return kept


class LabelMetrics:
    """`compute_metrics` of a Trainer for classifiers.

    Args:
        names: which metrics.
        of_numbers: whether the model is of regression.

    Attributes:
        given: what the values are called that it gave.
    """

    def __init__(self, names: list[str], *, of_numbers: bool) -> None:
        self.names = names
        self.of_numbers = of_numbers
        self.given: tuple[str, ...] = ()

    def __call__(self, prediction: EvalPrediction) -> dict[str, float]:
        """Compute the metrics of predictions."""
        logits = prediction.predictions
        logits = logits[0] if isinstance(logits, tuple) else logits
        predicted = logits[:, 0] if self.of_numbers else logits.argmax(-1)
        found = compute(self.names, predicted, prediction.label_ids)
        self.given = tuple(found)
        return found


def label_metrics(recipe: Recipe, reader: Reader) -> LabelMetrics | None:
    """`compute_metrics` of a Trainer for classifiers; `None` if there is nothing to compute."""
    names = recipe.evaluation.metrics
    if not names or reader.task not in CLASSIFIED:
        return None
    return LabelMetrics(names, of_numbers=isinstance(reader.labels, Numbers))


def answer_of(text: str, pattern: str | None) -> str:
    """The last match of the pattern's first group, without thousands' commas; else the text.

    Args:
        text: generated, or the reference.
        pattern: `None` takes the whole text.

    Returns:
        The answer; empty if the pattern matches nowhere, which no reference is.
    """
    if pattern is None:
        return text.strip()
    found = re.findall(pattern, text)
    if not found:
        return ""
    last = found[-1] if isinstance(found[-1], str) else found[-1][0]
    return _THOUSANDS.sub("", last).strip()


def _answers(
    model: nn.Module, recipe: Recipe, task: Task, rows: list[Any], encoder: Encoder
) -> tuple[list[str], list[str]]:
    """Generated and true answers, of all processes."""
    pattern = recipe.evaluation.answer
    read = [(encoder.prompt(row), encoder.completion(row)) for row in rows]
    asked = [(prompt, reference) for prompt, reference in read if reference is not None]
    pairs = [(prompt, reference) for prompt, reference in asked if prompt is not None]
    _tell_of_long(len(asked) - len(pairs), len(asked), encoder.section)
    found: list[tuple[str, str]] = []
    with process_state().split_between_processes(pairs) as share:
        mine = cast("list[tuple[list[int], str]]", share)
        size = recipe.read_evaluation().batch_size
        for i in range(0, len(mine), size):
            part = mine[i : i + size]
            texts = _generated(model, recipe, task, [p for p, _ in part], encoder.processor)
            found += [(text, reference) for text, (_, reference) in zip(texts, part, strict=True)]
    found = gather_object(found)
    return (
        [answer_of(text, pattern) for text, _ in found],
        [answer_of(reference, pattern) for _, reference in found],
    )


def _tell_of_long(n_long: int, n: int, section: DataSection) -> None:
    length = section.length
    if n and n_long == n:
        raise DataError(
            f"all {n} prompts to evaluate on are as long as data.max_length={length} tokens, which leaves no "
            "room for an answer; set it higher, or leave evaluation.metrics empty."
        )
    if n_long and process_state().is_main_process:
        warn(
            f"{n_long} of {n} prompts to evaluate on are as long as data.max_length={length} tokens; as in "
            "the loss, their answers do not count in the metrics."
        )


def _generated(
    model: Any, recipe: Recipe, task: Task, prompts: list[list[int]], tokenizer: Any
) -> list[str]:
    """Continue prompts greedily; those of causal models are padded on the left."""
    side = tokenizer.padding_side
    tokenizer.padding_side = "left" if task == "CAUSAL_LM" else "right"
    try:
        encoded = tokenizer.pad({"input_ids": prompts}, return_tensors="pt")
    finally:
        tokenizer.padding_side = side
    inputs = {k: encoded[k].to(model.device) for k in ("input_ids", "attention_mask")}
    model.eval()
    with torch.no_grad():
        out = model.generate(
            **inputs,
            max_new_tokens=recipe.evaluation.max_new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
    if task == "CAUSAL_LM":
        out = out[:, inputs["input_ids"].shape[1] :]
    return tokenizer.batch_decode(out, skip_special_tokens=True)
