"""One run of a recipe: data, model, start, training, evaluation, export, push."""

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, cast

import transformers
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import Trainer, TrainingArguments

from ..analysis import check_available, draw_losses, is_available
from ..calibration import DEFERRED
from ..errors import ConfigError, warn
from ..export import check_export
from ..files import check_writable, write_json
from ..layouts import process_state
from ..methods import METHODS
from ..tuners import deferred_adapters, load_for_training, restore_record
from .data import load_rows
from .evaluation import check_evaluation, evaluate_model
from .exporting import (
    check_places,
    exports_of,
    remove_exports,
    write_exports,
    written_adapter,
)
from .methods import adapter_config, calibration_of
from .models import untrained_modules
from .publishing import make_repository, publish
from .reading import Reader
from .resuming import check_base_of, check_continues, check_optimizer, checkpoint_of
from .schema import Recipe
from .sections import CLASSIFIED
from .trainers import Inputs, arguments_of, check_has_end, preparation_of, trainer_of

RESULTS, PICTURE = "results.json", "loss.png"


def finetune(recipe: Recipe) -> dict[str, Any]:
    """Run a recipe from the model to the evaluated adapter.

    Whatever can be checked is checked before a model is loaded. Writes into `recipe.output`:
    `adapter/`, one folder for each further export, `results.json`, and `loss.png` beside the losses of
    the baselines. What an earlier run has written there goes, also its other exports.

    Args:
        recipe: what to do.

    Returns:
        What `results.json` holds: losses, metrics, the start's report, sizes.
    """
    output, state = Path(recipe.output), process_state()
    check_writable(output)
    check_places(recipe)
    draws = _draws(recipe)
    transformers.set_seed(recipe.training.seed)
    baselines = {folder: _baseline(folder) for folder in recipe.baselines}
    recipe, inputs, arguments = _inputs(recipe.model_copy(update={"data": recipe.read_data()}))
    checkpoint = checkpoint_of(recipe, arguments)
    check_evaluation(recipe, inputs.reader, inputs.evaluation_rows, arguments)
    if recipe.push is not None and state.is_main_process:
        make_repository(recipe.push)
    model = inputs.reader.load_model(recipe.model)
    if recipe.model.quantization is None:
        model.to(state.device)
    trainer = _trainer(model, recipe, inputs, arguments, checkpoint)
    adapted: Any = trainer.model
    for target, rank in () if deferred_adapters(adapted) else exports_of(recipe):
        check_export(adapted, target, rank)
    trainer.train(resume_from_checkpoint=checkpoint)
    trained: Any = trainer.accelerator.unwrap_model(trainer.model)
    _check_finite(trained, _peak_rate(trainer))
    results = _results(trainer, recipe, inputs.reader)
    if state.is_main_process:
        with written_adapter(trained, output / "adapter", inputs.reader.processor):
            _forget_earlier(output)
        _remove_if_empty(Path(str(trainer.args.output_dir)))
        write_json(output / RESULTS, results)
    state.wait_for_everyone()
    if inputs.evaluation_rows is not None:
        metrics = evaluate_model(trainer, recipe, inputs.reader, inputs.evaluation_rows)
        results |= {"metrics": metrics, "eval_losses": _eval_losses(trainer)}
        if state.is_main_process:
            write_json(output / RESULTS, results)
    if state.is_main_process:
        if draws:
            draw_losses(_curves(results, baselines), output / PICTURE)
        write_exports(trained, recipe, inputs.reader.processor)
        if recipe.push is not None:
            publish(trained, inputs.reader.processor, recipe.push, output / "adapter")
    state.wait_for_everyone()
    return results


def _inputs(recipe: Recipe) -> tuple[Recipe, Inputs, TrainingArguments]:
    """Read the data; the recipe comes back with the length that sequences have."""
    rows = load_rows(recipe.data)
    reader = Reader.of(recipe.model, recipe.data, rows)
    reader = dataclasses.replace(reader, options=preparation_of(recipe.training))
    held_out = None
    if recipe.data.eval_split is not None or recipe.data.n_eval is not None:
        held_out = load_rows(recipe.data, evaluation=True)
    recipe = recipe.model_copy(update={"data": reader.section})
    arguments = arguments_of(recipe, reader.task, evaluates=held_out is not None)
    packing = getattr(arguments, "eval_packing", None)
    of_evaluation = reader.packed(reader.section.packing if packing is None else packing)
    check_has_end(rows, arguments)
    with process_state().main_process_first():
        train = reader.encode(rows)
        evaluation = None if held_out is None else of_evaluation.encode(held_out)
        if held_out is not None and recipe.data.drop_longer and recipe.evaluation.metrics:
            held_out = held_out if reader.task in CLASSIFIED else reader.kept(held_out)
    return recipe, Inputs(reader, train, evaluation, held_out), arguments


def _trainer(
    model: nn.Module,
    recipe: Recipe,
    inputs: Inputs,
    arguments: TrainingArguments,
    checkpoint: str | None,
) -> Trainer:
    """The trainer of the model with its adapter.

    A resumed run takes the start from its checkpoint. For preferences the trainer adds the adapter
    itself, since one that is there already becomes the reference of TRL, also if it was trained; and
    the start is computed in training, from the loss of pairs.
    """
    has_start = recipe.method.name in {m.name for m in METHODS}
    if checkpoint is not None:
        check_continues(model, recipe.method, inputs.reader.task, checkpoint)
        check_optimizer(recipe.training, arguments, checkpoint)
        if not has_start:
            check_base_of(model, checkpoint)
    if inputs.reader.task == "PREFERENCE":
        trainer = trainer_of(model, recipe, inputs, arguments, _preference_config(recipe))
        if checkpoint is not None and has_start:
            restore_record(cast("nn.Module", trainer.model), checkpoint)
        return trainer
    if checkpoint is not None and has_start:
        return trainer_of(load_for_training(model, checkpoint), recipe, inputs, arguments)
    calibration = calibration_of(
        inputs.train,
        recipe.calibration,
        inputs.reader.processor,
        progress=process_state().is_main_process,
    )
    untrained = untrained_modules(model)
    config = adapter_config(recipe.method, inputs.reader.task, calibration, untrained)
    return trainer_of(get_peft_model(model, config), recipe, inputs, arguments)


def _preference_config(recipe: Recipe) -> PeftConfig:
    if recipe.calibration.sketch_size is not None:
        raise ConfigError(
            "calibration.sketch_size is not for PREFERENCE, whose start the trainer computes; leave "
            "it out."
        )
    return adapter_config(recipe.method, "PREFERENCE", recipe.calibration.result or DEFERRED)


def _results(trainer: Trainer, recipe: Recipe, reader: Reader) -> dict[str, Any]:
    """What is known of a run before it is evaluated."""
    history = trainer.state.log_history
    model: Any = trainer.accelerator.unwrap_model(trainer.model)
    reports = getattr(model.base_model, "init_report", None) or {}
    report = reports.get("default")
    return {
        "title": recipe.title,
        "method": recipe.method.name,
        "recipe": recipe.model_dump(mode="json"),
        "losses": [[entry["step"], entry["loss"]] for entry in history if "loss" in entry],
        "eval_losses": _eval_losses(trainer),
        "metrics": {},
        "labels": reader.labels and list(reader.labels.head()["id2label"].values()),
        "learning_rate": _peak_rate(trainer),
        "processes": trainer.args.world_size,
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "start": report.to_dict() if report else None,
    }


def _eval_losses(trainer: Trainer) -> list[list[float]]:
    """Steps and losses of the evaluation, one for each step: that of the model at this step.

    The evaluation after training logs at the last step as well, maybe of the best model, which is that
    of another step.
    """
    state = trainer.state
    logged = [(e["step"], e["eval_loss"]) for e in state.log_history if "eval_loss" in e]
    if trainer.args.load_best_model_at_end and state.best_model_checkpoint:
        logged = logged[:-1]
    return [[step, loss] for step, loss in dict(reversed(logged)).items()][::-1]


def _peak_rate(trainer: Trainer) -> float:
    """The rate that the schedule multiplies; a resumed optimiser has it from its checkpoint."""
    optimizer: Any = trainer.optimizer
    return optimizer.param_groups[0].get("initial_lr", trainer.args.learning_rate)


def _check_finite(model: PeftModel, rate: float) -> None:
    """Refuse what a run has made of an adapter if it diverged, before an earlier adapter is replaced.

    Raises:
        ConfigError: naming a parameter and the rate.
    """
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    lost = [name for name, p in trained.items() if not p.isfinite().all()]
    if lost:
        raise ConfigError(
            f"the run diverged: {len(lost)} of {len(trained)} trained parameters are not finite "
            f"({lost[0]}, …), so no adapter was written; lower training.learning_rate, which was {rate:g}."
        )


def _forget_earlier(output: Path) -> None:
    """Remove what an earlier run has made of its adapter, which the adapter of this one replaces."""
    for name in (RESULTS, PICTURE):
        (output / name).unlink(missing_ok=True)
    remove_exports(output)


def _remove_if_empty(folder: Path) -> None:
    """Remove the folder of the checkpoints, which the trainer makes, if there are none."""
    with contextlib.suppress(OSError):
        folder.rmdir()


def _draws(recipe: Recipe) -> bool:
    """Whether there will be a picture of the losses.

    Raises:
        ConfigError: if matplotlib is missing, and the recipe asks for the picture by its baselines.
    """
    if recipe.baselines:
        check_available()
    if available := is_available():
        return available
    warn(f"{PICTURE} will not be drawn without matplotlib; pip install 'peft_gradinit[plots]'.")
    return False


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
    """The run's losses, in training and of the evaluation rows, and those of its baselines."""
    curves = {results["method"]: _points(results)}
    if results["eval_losses"]:
        evaluated = [(step, loss) for step, loss in results["eval_losses"]]
        curves[f"{results['method']}, evaluation"] = evaluated
    for folder, (name, points) in baselines.items():
        known = (name, f"{name} ({Path(folder).name})", f"{name} ({folder})")
        curves[next((label for label in known if label not in curves), known[-1])] = points
    return curves


def _points(results: dict[str, Any]) -> list[tuple[float, float]]:
    return [(step, loss) for step, loss in results["losses"]]
