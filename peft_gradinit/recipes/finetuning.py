"""One run of a recipe: data, model, start, training, evaluation, export, push."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
import transformers
from peft import PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import get_last_checkpoint

from ..analysis import check_available, draw_losses
from ..errors import ConfigError
from ..export import export_adapter
from ..files import check_writable, write_json
from ..layouts import process_state
from ..methods import METHODS
from ..optim import optimizer
from ..trainer import SUGGESTED, CalibrationCallback
from ..tuners import load_for_training
from .collation import collator
from .data import load_rows
from .evaluation import check_evaluation, evaluate_model, label_metrics
from .methods import adapter_config, calibration_of
from .progress import Losses
from .publishing import make_repository, publish
from .reading import Reader
from .rows import Rows
from .schema import PAIR_OPTIMIZERS, Recipe

_FIELDS = {field.name for field in dataclasses.fields(TrainingArguments)}
_CHECKPOINTING = (
    f"{'activation' if 'activation_checkpointing' in _FIELDS else 'gradient'}_checkpointing"
)
"""Later versions of transformers gave the argument a new name and warns of the old one."""

RESULTS, PICTURE = "results.json", "loss.png"


@dataclasses.dataclass(frozen=True)
class _Inputs:
    """What a run is made from."""

    reader: Reader
    train: Rows
    evaluation: Rows | None
    evaluation_rows: Rows | None


def finetune(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe from the model to the evaluated adapter.

    Whatever can be checked is checked before a model is loaded. Writes into `recipe.output`: `adapter/`, one folder for each further export, `results.json`, and
    `loss.png` beside the losses of the baselines.

    Args:
        recipe: what to do.

    Returns:
        What `results.json` holds: losses, metrics, the start's report, sizes.
    """
    output, state = Path(recipe.output), process_state()
    check_writable(output)
    check_available()
    transformers.set_seed(recipe.training.seed)
    baselines = {folder: _baseline(folder) for folder in recipe.baselines}
    checkpoint, inputs = _last_checkpoint(recipe), _inputs(recipe)
    recipe = recipe.model_copy(update={"data": inputs.reader.section})
    check_evaluation(recipe, inputs.reader, inputs.evaluation_rows)
    if recipe.push is not None and state.is_main_process:
        make_repository(recipe.push)
    model = inputs.reader.load_model(recipe.model)
    if recipe.model.quantization is None:
        model.to(state.device)
    peft_model = _started(model, recipe, inputs, checkpoint, progress=state.is_main_process)
    trainer = _trainer(peft_model, recipe, inputs)
    trainer.train(resume_from_checkpoint=checkpoint)
    metrics = {}
    if inputs.evaluation_rows is not None:
        metrics = evaluate_model(trainer, recipe, inputs.reader, inputs.evaluation_rows)
    results = _results(trainer, recipe, inputs.reader, metrics)
    if state.is_main_process:
        _write(peft_model, recipe, inputs, results)
        draw_losses(_curves(results, baselines), output / PICTURE)
        if recipe.push is not None:
            publish(peft_model, recipe.push, output / "adapter")
    state.wait_for_everyone()
    return results


def _inputs(recipe: Recipe) -> _Inputs:
    rows = load_rows(recipe.data)
    reader = Reader.of(recipe.model, recipe.data, rows)
    held_out = None
    if recipe.data.eval_split is not None or recipe.data.n_eval is not None:
        held_out = load_rows(recipe.data, evaluation=True)
    with process_state().main_process_first():
        train = reader.encode(rows)
        evaluation = None if held_out is None else reader.encode(held_out)
    return _Inputs(reader, train, evaluation, held_out)


def _started(
    model: nn.Module, recipe: Recipe, inputs: _Inputs, checkpoint: str | None, *, progress: bool
) -> PeftModel:
    """The model with its adapter; a resumed one takes its start from the checkpoint."""
    if checkpoint is not None and recipe.method.name in {m.name for m in METHODS}:
        return load_for_training(model, checkpoint)
    calibration = calibration_of(
        inputs.train, recipe.calibration, inputs.reader.processor, progress=progress
    )
    config = adapter_config(recipe.method, inputs.reader.task, calibration)
    return get_peft_model(model, config)


def _trainer(model: PeftModel, recipe: Recipe, inputs: _Inputs) -> Trainer:
    reader = inputs.reader
    trainer = Trainer(
        model=model,
        args=_arguments(recipe, evaluates=inputs.evaluation is not None),
        data_collator=collator(reader.processor),
        train_dataset=inputs.train,  # pyright: ignore[reportArgumentType]
        eval_dataset=inputs.evaluation,  # pyright: ignore[reportArgumentType]
        processing_class=reader.processor,
        compute_metrics=label_metrics(recipe, reader),
        optimizer_cls_and_kwargs=_optimizer(recipe),
    )
    for silent in (PrinterCallback, ProgressCallback):  # they print logs to standard output
        trainer.remove_callback(silent)
    trainer.add_callback(Losses())
    rate, head_rate = recipe.training.learning_rate, recipe.training.head_learning_rate
    own = recipe.training.optim in PAIR_OPTIMIZERS  # which has both rates
    if not own and (rate == SUGGESTED or head_rate is not None):
        rates: dict[str, Any] = {"learning_rate": SUGGESTED if rate == SUGGESTED else None}
        trainer.add_callback(CalibrationCallback(trainer, head_learning_rate=head_rate, **rates))
    return trainer


def _optimizer(recipe: Recipe) -> Any:
    """An optimiser of pairs as `Trainer` takes it; `None` for one of Transformers."""
    training = recipe.training
    if training.optim not in PAIR_OPTIMIZERS:
        return None
    options: dict[str, Any] = {"lr": training.learning_rate, "weight_decay": training.weight_decay}
    if training.head_learning_rate is not None:
        options["head_lr"] = training.head_learning_rate
    return optimizer(training.optim, **options)


def _arguments(recipe: Recipe, *, evaluates: bool) -> TrainingArguments:
    training, evaluation = recipe.training, recipe.evaluation
    in_training = evaluates and evaluation.steps is not None
    options: dict[str, Any] = {_CHECKPOINTING: training.gradient_checkpointing}
    if training.learning_rate != SUGGESTED:
        options["learning_rate"] = training.learning_rate
    return TrainingArguments(
        output_dir=str(Path(recipe.output) / "checkpoints"),
        num_train_epochs=training.epochs,
        max_steps=training.max_steps,
        per_device_train_batch_size=training.batch_size,
        per_device_eval_batch_size=evaluation.batch_size,
        gradient_accumulation_steps=training.gradient_accumulation,
        warmup_steps=training.warmup,
        lr_scheduler_type=training.schedule,
        optim="adamw_torch" if training.optim in PAIR_OPTIMIZERS else training.optim,
        weight_decay=training.weight_decay,
        max_grad_norm=training.max_grad_norm,
        adam_beta1=training.adam_betas[0],
        adam_beta2=training.adam_betas[1],
        bf16=training.precision == "bf16",
        fp16=training.precision == "fp16",
        **options,
        logging_steps=training.logging_steps,
        save_strategy="no" if training.save_steps is None else "steps",
        save_steps=training.save_steps or 500,
        eval_strategy="steps" if in_training else "no",
        eval_steps=evaluation.steps,
        seed=training.seed,
        report_to="none",
        label_names=["labels"],
        remove_unused_columns=False,
        use_cpu=not torch.accelerator.is_available(),
    )


def _last_checkpoint(recipe: Recipe) -> str | None:
    """Where to continue.

    Args:
        recipe: whether to.

    Returns:
        The last checkpoint; `None` if the run begins.

    Raises:
        ConfigError: if there is none to continue from.
    """
    if not recipe.training.resume:
        return None
    folder = Path(recipe.output) / "checkpoints"
    found = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if found is None:
        raise ConfigError(
            f"training.resume=true, but {str(folder)!r} holds no checkpoint; leave it out to begin, "
            "and set training.save_steps to have checkpoints."
        )
    return found


def _results(
    trainer: Trainer, recipe: Recipe, reader: Reader, metrics: dict[str, float]
) -> dict[str, Any]:
    history = trainer.state.log_history
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    reports = getattr(model.base_model, "init_report", None) or {}
    report = reports.get("default")
    return {
        "title": recipe.title,
        "method": recipe.method.name,
        "recipe": recipe.model_dump(mode="json"),
        "losses": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "eval_losses": [[e["step"], e["eval_loss"]] for e in history if "eval_loss" in e],
        "metrics": metrics,
        "labels": reader.labels and list(reader.labels.head()["id2label"].values()),
        "learning_rate": trainer.args.learning_rate,
        "processes": trainer.args.world_size,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "start": report.to_dict() if report else None,
    }


def _write(model: PeftModel, recipe: Recipe, inputs: _Inputs, results: dict[str, Any]) -> None:
    output = Path(recipe.output)
    model.save_pretrained(str(output / "adapter"))
    if hasattr(inputs.reader.processor, "save_pretrained"):
        inputs.reader.processor.save_pretrained(str(output / "adapter"))
    for target in recipe.export.targets:
        if target != "peft" or recipe.export.rank is not None:
            rank = recipe.export.rank if target != "merged" else None
            export_adapter(model, output / target, target, rank, overwrite=True)
    write_json(output / RESULTS, results)


def _baseline(folder: str) -> tuple[str, list[tuple[float, float]]]:
    """What the run is drawn beside.

    Args:
        folder: output of another run.

    Returns:
        Its method, and its losses by step.

    Raises:
        ConfigError: if it has no results.
    """
    try:
        content = json.loads((Path(folder) / RESULTS).read_text(encoding="utf-8"))
        return content["method"], _points(content)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"the baseline {folder!r} holds no readable {RESULTS}: {error}; run it first, or leave "
            "it out."
        ) from error


def _curves(
    results: dict[str, Any], baselines: dict[str, tuple[str, list[tuple[float, float]]]]
) -> dict[str, list[tuple[float, float]]]:
    """The run's losses and those of its baselines, by name."""
    curves = {results["method"]: _points(results)}
    for folder, (name, points) in baselines.items():
        curves[name if name not in curves else f"{name} ({Path(folder).name})"] = points
    return curves


def _points(results: dict[str, Any]) -> list[tuple[float, float]]:
    return [(step, loss) for step, loss in results["losses"]]
