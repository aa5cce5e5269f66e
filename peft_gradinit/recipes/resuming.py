"""Continuing a run: from which checkpoint, and whether it is one of this recipe."""

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from peft.utils.constants import SEQ_CLS_HEAD_NAMES
from torch import nn
from transformers import Trainer, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from ..errors import ConfigError, warn
from ..records import PROVENANCE_FILE, facts_of, read_provenance
from ..trainer import SUGGESTED
from .methods import adapter_config
from .models import untrained_modules
from .schema import MethodSection, Recipe
from .sections import Task
from .training import PAIR_OPTIMIZERS, TrainingSection

_OPTIMIZER = "optimizer.pt"
_OF_ADAM = {"adamw_torch", "adamw_torch_fused"}
"""Optimisers that take every number of Adam from the arguments of the trainer."""


def checkpoint_of(recipe: Recipe, arguments: TrainingArguments) -> str | None:
    """Where to continue.

    Args:
        recipe: whether to.
        arguments: where checkpoints are.

    Returns:
        A checkpoint; `None` if the run begins.

    Raises:
        ConfigError: if there is none to continue from; or if the run begins, and its checkpoints would
            stand among those of an earlier run, from which a later one might continue.
    """
    asked = recipe.training.resume_from_checkpoint
    folder = Path(arguments.output_dir or "")
    last = get_last_checkpoint(str(folder)) if folder.is_dir() else None
    if not asked:
        if last is not None and arguments.save_strategy != "no":
            raise ConfigError(
                f"{str(folder)!r} holds checkpoints of an earlier run, up to {Path(last).name}; set "
                "training.resume_from_checkpoint to continue it, or give another output, or move "
                "them away."
            )
        return None
    if isinstance(asked, str):
        folder, found = Path(asked), asked if Path(asked).is_dir() else None
    else:
        found = last
    if found is None:
        raise ConfigError(
            f"training.resume_from_checkpoint={asked}, but {str(folder)!r} holds no checkpoint; leave "
            "it out to begin, and set training.save_steps to have checkpoints."
        )
    return found


def check_continues(model: nn.Module, method: MethodSection, task: Task, checkpoint: str) -> None:
    """Refuse a checkpoint of another adapter, which would be trained on under this one's name.

    Args:
        model: the base.
        method: what the recipe says.
        task: what the model is for.
        checkpoint: where it is.

    Raises:
        ConfigError: naming what differs.
    """
    if (Path(checkpoint) / PROVENANCE_FILE).exists():
        kept = read_provenance(checkpoint)["config"]
    else:
        kept = facts_of(PeftConfig.from_pretrained(checkpoint), None)["config"]
    config = adapter_config(method, task, "unused", untrained_modules(model))
    wanted = facts_of(config, None)["config"]
    if task == "SEQ_CLS":  # PEFT has added its heads to the checkpoint's list
        for config in (kept, wanted):
            modules = {*(config.get("modules_to_save") or ()), *SEQ_CLS_HEAD_NAMES}
            config["modules_to_save"] = sorted(modules)
    names = ["r", "lora_alpha", "use_rslora", "use_dora", *method.options]
    pairs = {name: (kept.get(name), wanted.get(name)) for name in names}
    if isinstance(method.target_modules, list):  # PEFT shortens long lists
        before, now = (_layers(model, config["target_modules"]) for config in (kept, wanted))
        if before != now:
            pairs["target_modules"] = kept["target_modules"], method.target_modules
    if kept["peft_type"] != wanted["peft_type"]:
        pairs = {"name": (kept["peft_type"].lower(), method.name)}
    changed = [f"{name}={old!r} (now {new!r})" for name, (old, new) in pairs.items() if old != new]
    if changed:
        raise ConfigError(
            f"the checkpoint {checkpoint!r} is of a run with method.{', method.'.join(changed)}; put the "
            "recipe back to continue it, or give another output to begin."
        )


def _layers(model: nn.Module, targets: Any) -> Any:
    """The layers that a list of names means."""
    if isinstance(targets, str) or targets is None:
        return targets
    ends = tuple(f".{target}" for target in targets)
    return {name for name, _ in model.named_modules() if f".{name}".endswith(ends)}


def check_base_of(model: Any, checkpoint: str) -> None:
    """Warn of a checkpoint of PEFT's LoRA that was made on a model of another name.

    Args:
        model: the base.
        checkpoint: where it is; it holds no fingerprint of the weights.
    """
    before = PeftConfig.from_pretrained(checkpoint).base_model_name_or_path
    now = getattr(model, "name_or_path", None)
    if before and now and Path(before).resolve() != Path(now).resolve():
        warn(
            f"the checkpoint {checkpoint!r} was trained on {before!r}, and the recipe has "
            f"model.name={now!r}; put it back, unless both are the same model."
        )


def check_optimizer(
    training: TrainingSection, arguments: TrainingArguments, checkpoint: str
) -> None:
    """Refuse numbers of an optimiser that would not be used: those of its saved state win.

    Args:
        training: what the recipe says.
        arguments: of the trainer.
        checkpoint: where the run continues; a state that is sharded is not looked into.

    Raises:
        ConfigError: naming what differs.
    """
    if not (path := Path(checkpoint) / _OPTIMIZER).exists():
        return
    groups = torch.load(path, map_location="cpu", weights_only=True)["param_groups"]
    _check_kind(training, arguments, groups[0], checkpoint)
    if training.said().get("optim_args"):  # which may say the same numbers
        return
    first = groups[0]  # of the pairs, or of what decays
    pairs = {"weight_decay": (first["weight_decay"], training.weight_decay)}
    rate, rates = training.learning_rate, [g["initial_lr"] for g in groups if "initial_lr" in g]
    if rate != SUGGESTED and rates:  # a head may have another one
        pairs["learning_rate"] = (min(rates, key=lambda r: abs(r - rate)), rate)
    if training.optim in _OF_ADAM and "betas" in first:
        saved = {"beta1": first["betas"][0], "beta2": first["betas"][1], "epsilon": first["eps"]}
        pairs |= {f"adam_{n}": (v, getattr(arguments, f"adam_{n}")) for n, v in saved.items()}
    changed = [
        f"training.{name}={old:g} (now {new:g})"
        for name, (old, new) in pairs.items()
        if not math.isclose(old, new, rel_tol=1e-3)
    ]
    if changed:
        raise ConfigError(
            f"the checkpoint {checkpoint!r} is of a run with {', '.join(changed)}, which its optimiser "
            "keeps; put the recipe back to continue it, or give another output to begin."
        )


def _check_kind(
    training: TrainingSection, arguments: TrainingArguments, saved: dict[str, Any], checkpoint: str
) -> None:
    """Refuse the state of another optimiser; optimisers of pairs do so themselves.

    Raises:
        ConfigError: naming options that only one of the two has.
    """
    if training.optim in PAIR_OPTIMIZERS:
        return
    try:
        kind, options = Trainer.get_optimizer_cls_and_kwargs(arguments)
        made = kind([nn.Parameter(torch.zeros(1))], **options).param_groups[0]
    except (TypeError, ValueError, RuntimeError, AttributeError, ImportError):  # needs the model
        return
    more, less = sorted(made.keys() - saved.keys()), sorted(saved.keys() - made.keys())
    less = [name for name in less if name not in ("initial_lr", "weight_decay")]
    if more and less:  # other versions of one optimiser have more, or fewer
        raise ConfigError(
            f"the checkpoint {checkpoint!r} is of a run with another training.optim: its optimiser has "
            f"the options {less}, and {training.optim!r} has {more} in their place; put the recipe back "
            "to continue it, or give another output to begin."
        )
