"""The trainer of a recipe: which class, with which arguments, callbacks and optimiser."""

import ast
import dataclasses
import sys
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.utils import parse_flag_from_env
from peft import PeftConfig
from torch import nn
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.sft_config import SFTConfig
from trl.trainer.sft_trainer import SFTTrainer

from ..calibration import DEFERRED
from ..errors import ConfigError, DataError, warn
from ..optim import optimizer
from ..trainer import SUGGESTED, CalibrationCallback
from ..tuners import suggest_learning_rate
from .collation import collator
from .evaluation import label_metrics
from .progress import Bar, Losses
from .reading import Reader
from .rows import Rows
from .schema import SAME_IN_DATA, Recipe
from .sections import CLASSIFIED, Task
from .training import ARGUMENTS, PAIR_OPTIMIZERS, TrainingSection, check_training

_OF_TRL = ("CAUSAL_LM", "PREFERENCE")
_NOT_FIELDS = {
    "optim",
    "learning_rate",
    "head_learning_rate",
    "save_steps",
    "resume_from_checkpoint",
    "gradient_checkpointing",
}
"""Keys of `TrainingSection` that the arguments have under other conditions, or not at all."""

_BESIDE_PAIRS = ("modules_to_save", "trainable_token_indices", "use_dora", "lora_bias")
"""Options of an adapter by which more is trained than its pairs."""

_GENERAL = {field.name for field in dataclasses.fields(TrainingArguments)}
_CHECKPOINTING = (
    f"{'activation' if 'activation_checkpointing' in _GENERAL else 'gradient'}_checkpointing"
)
"""Later versions of transformers gave the argument a new name and warn of the old one."""


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a run is made from.

    Attributes:
        reader: of the rows.
        train: encoded rows to train on.
        evaluation: encoded rows to evaluate on; `None` if there are none.
        evaluation_rows: the same as they are in the dataset; longer ones are dropped from both.
    """

    reader: Reader
    train: Rows
    evaluation: Rows | None
    evaluation_rows: Rows | None


def arguments_of(recipe: Recipe, task: Task, *, evaluates: bool) -> TrainingArguments:
    """The arguments of the trainer.

    Args:
        recipe: what is said of them.
        task: what the model is for.
        evaluates: whether there are rows to evaluate on.

    Returns:
        An object of the class of the task.

    Raises:
        ConfigError: if the class has no such field, or refuses a value; if the optimiser has no
            such option, or lacks a rate; if the model would be sharded.
    """
    training = recipe.training
    if faults := check_training(training, task):
        raise ConfigError("; ".join(faults) + ".")
    values = _defaults(recipe, task, evaluates=evaluates)
    own = {name: getattr(training, name) for name in TrainingSection.model_fields}
    said = {**own, **training.said()}
    values |= {name: value for name, value in said.items() if name not in _NOT_FIELDS}
    if task == "CAUSAL_LM":
        values |= _of_prepared_rows(recipe)
    if training.said().get("fsdp") or parse_flag_from_env("ACCELERATE_USE_FSDP"):
        _refuse_sharding("FSDP")  # before transformers tells all later trainers of this process
    try:
        arguments = ARGUMENTS[task](**values)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise ConfigError(f"training: {error}") from error
    if getattr(arguments.deepspeed_plugin, "zero_stage", None) == 3:
        _refuse_sharding("ZeRO-3")
    _check_reports(arguments)
    _, options = _optimizer(training, rate=1.0) or (None, {})  # refuses options that it has not
    if options and "head_lr" not in options:
        _check_all_in_pairs(recipe, task)
    return arguments


def _refuse_sharding(kind: str) -> None:
    """Refuse to shard the model: what is saved, evaluated and exported here is a whole one."""
    raise ConfigError(
        f"a recipe trains a whole model on every device, and {kind}, which training or the launcher asks for, "
        "shards it; leave that out (model.quantization makes the base smaller), or train in a script with "
        "Trainer, where sharded models are supported."
    )


def check_has_end(rows: Rows, arguments: TrainingArguments) -> None:
    """Refuse to train on a stream without a number of steps, before anything is computed.

    Args:
        rows: to train on.
        arguments: of the trainer.

    Raises:
        ConfigError: if there is no number.
    """
    if isinstance(rows, datasets.IterableDataset) and arguments.max_steps <= 0:
        raise ConfigError(
            "data.streaming reads rows whose number is not known, so training.max_steps has to say how long "
            "to train; give it, or leave data.streaming out."
        )


def _check_all_in_pairs(recipe: Recipe, task: Task) -> None:
    """Refuse an optimiser of pairs without a rate for what trains beside them, if the recipe tells.

    Raises:
        ConfigError: if there is a head of classes, or an option by which more is trained.
    """
    options = recipe.method.options
    asked = [f"method.options.{name}" for name in _BESIDE_PAIRS if options.get(name)]
    asked += ["method.options.bias"] if options.get("bias", "none") != "none" else []
    if task in CLASSIFIED or asked:
        what = " and ".join(asked) or f"the head of {task}"
        raise ConfigError(
            f"training.optim={recipe.training.optim!r} steps the pairs of the adapter, but {what} "
            "trains as well, by AdamW; give its rate as training.head_learning_rate (1e-3, say)."
        )


def _defaults(recipe: Recipe, task: Task, *, evaluates: bool) -> dict[str, Any]:
    training, evaluation = recipe.training, recipe.evaluation
    in_training = evaluates and evaluation.steps is not None
    checkpointing = "gradient_checkpointing" if task in _OF_TRL else _CHECKPOINTING
    values: dict[str, Any] = {
        "output_dir": str(Path(recipe.output) / "checkpoints"),
        "per_device_eval_batch_size": evaluation.batch_size,
        "eval_strategy": "steps" if in_training else "no",
        "eval_steps": evaluation.steps,
        "save_strategy": "no" if training.save_steps is None else "steps",
        "save_steps": training.save_steps or 500,
        "optim": "adamw_torch" if training.optim in PAIR_OPTIMIZERS else training.optim,
        "use_cpu": not torch.accelerator.is_available(),
        "disable_tqdm": not sys.stderr.isatty(),
        checkpointing: training.gradient_checkpointing,
    }
    if training.learning_rate != SUGGESTED:
        values["learning_rate"] = training.learning_rate
    if task == "PREFERENCE":
        values["max_length"] = recipe.read_data().length
    if task not in _OF_TRL:
        values |= {"label_names": ["labels"], "remove_unused_columns": False}
    return values


def _of_prepared_rows(recipe: Recipe) -> dict[str, Any]:
    """Fields of `SFTConfig` for rows that are tokenised, masked and cut already."""
    return {
        "packing": recipe.read_data().packing,
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "max_length": None,
        "assistant_only_loss": False,
        "completion_only_loss": None,
        "chat_template_path": None,
    }


def preparation_of(training: TrainingSection) -> dict[str, Any]:
    """What a recipe says of how TRL prepares rows, apart from what is said of the data."""
    of_trl = {field.name for field in dataclasses.fields(SFTConfig)} - _GENERAL
    kept = of_trl - set(SAME_IN_DATA) - {"padding_free", "dataset_kwargs"} | {"seed"}
    return {name: value for name, value in training.said().items() if name in kept}


def _check_reports(arguments: TrainingArguments) -> None:
    known = {"none", "all", *get_available_reporting_integrations()}
    asked: Any = arguments.report_to or []
    missing = [name for name in ([asked] if isinstance(asked, str) else asked) if name not in known]
    if missing:
        raise ConfigError(
            f"training.report_to={missing} cannot be reported to here; installed are "
            f"{sorted(known - {'none', 'all'})}."
        )


def trainer_of(
    model: nn.Module,
    recipe: Recipe,
    inputs: Inputs,
    arguments: TrainingArguments,
    config: PeftConfig | None = None,
) -> Trainer:
    """The trainer, with its callbacks and optimiser.

    Args:
        model: with its adapter; for preferences without one.
        recipe: what is done.
        inputs: what it is done with.
        arguments: what `arguments_of` gave.
        config: of the adapter, for preferences: the model without it is the reference then.

    Returns:
        The trainer.
    """
    reader = inputs.reader
    given: dict[str, Any] = {
        "model": model,
        "args": arguments,
        "train_dataset": inputs.train,
        "eval_dataset": inputs.evaluation,
        "processing_class": reader.processor,
    }
    trainer: Trainer
    if reader.task == "PREFERENCE":
        trainer = DPOTrainer(**given, peft_config=config)
        for name in ("train_dataset", "eval_dataset"):
            _check_left(given[name], getattr(trainer, name), arguments)
    elif reader.task == "CAUSAL_LM":
        trainer = SFTTrainer(**given)
    else:
        kind = Seq2SeqTrainer if reader.task == "SEQ_2_SEQ_LM" else Trainer
        given |= {"data_collator": collator(reader.processor, model)}
        trainer = kind(**given, compute_metrics=label_metrics(recipe, reader))
    if _suggests_for_pairs(recipe.training):
        rate = suggest_learning_rate(model, optimizer=recipe.training.optim)
        arguments.learning_rate = rate.suggested
    trainer.optimizer_cls_and_kwargs = _optimizer(recipe.training, arguments.learning_rate)
    for silent in (PrinterCallback, ProgressCallback):  # they print logs to standard output
        trainer.remove_callback(silent)
    for callback in (Losses(), *([] if arguments.disable_tqdm else [Bar()])):
        trainer.add_callback(callback)
    if (callback := _starter(trainer, recipe, config)) is not None:
        trainer.add_callback(callback)
    return trainer


def _check_left(given: Any, left: Any, arguments: Any) -> None:
    """Tell of pairs that TRL leaves out for their length.

    Raises:
        DataError: if none is left.
    """
    if not (isinstance(given, datasets.Dataset) and isinstance(left, datasets.Dataset)):
        return
    lost = len(given) - len(left)
    said = f"longer than data.max_length={arguments.max_length} tokens"
    if lost and not len(left):
        raise DataError(
            f"all {lost} pairs of answers are {said}; set it higher, or give shorter ones."
        )
    if lost:
        warn(f"{lost} of {len(given)} pairs of answers are {said}, and are left out.")


def _starter(
    trainer: Trainer, recipe: Recipe, config: PeftConfig | None
) -> CalibrationCallback | None:
    """What starts a deferred adapter, and sets the rates."""
    training, section = recipe.training, recipe.calibration
    own = training.optim in PAIR_OPTIMIZERS  # which has both rates
    options: dict[str, Any] = {}
    if not own:
        suggested = training.learning_rate == SUGGESTED
        options["learning_rate"] = SUGGESTED if suggested else None
        options["head_learning_rate"] = training.head_learning_rate
    if getattr(config, "calibration", None) == DEFERRED:
        budget = {"max_tokens": section.max_tokens, "max_batches": section.max_batches}
        options |= {**budget, "estimator": section.estimator, "seed": section.seed}
    elif not any(options.values()):
        return None
    return CalibrationCallback(trainer, **options)


def parsed_arguments(text: str) -> dict[str, Any]:
    """Options from the text of `optim_args`, as in `momentum=0.8,nesterov=false` or `betas=(0.9, 0.95)`.

    Raises:
        ConfigError: if the text is no list of names with values.
    """
    try:
        call = ast.parse(f"options({text})", mode="eval").body
        if isinstance(call, ast.Call) and not call.args:
            found = {str(k.arg or ""): _value(k.value) for k in call.keywords}
            if "" not in found:
                return found
    except (SyntaxError, TypeError, ValueError):
        pass  # as if it were no list of names
    raise ConfigError(
        f"training.optim_args={text!r} is no list of names with values, such as "
        "'momentum=0.8,nesterov=false' or 'betas=(0.9, 0.95)'."
    )


def _value(written: ast.expr) -> Any:
    if isinstance(written, ast.Name):  # a word: of YAML, or a string without quotation marks
        return {"true": True, "false": False}.get(written.id.lower(), written.id)
    return ast.literal_eval(written)


def _suggests_for_pairs(training: TrainingSection) -> bool:
    return training.optim in PAIR_OPTIMIZERS and training.learning_rate == SUGGESTED


def _optimizer(training: TrainingSection, rate: float) -> Any:
    """An optimiser of pairs as `Trainer` takes it; `None` for one of Transformers."""
    if training.optim not in PAIR_OPTIMIZERS:
        return None
    options: dict[str, Any] = {"lr": rate, "weight_decay": training.weight_decay}
    options |= parsed_arguments(training.said().get("optim_args") or "")
    if training.head_learning_rate is not None:
        options["head_lr"] = training.head_learning_rate
    return optimizer(training.optim, **options)
