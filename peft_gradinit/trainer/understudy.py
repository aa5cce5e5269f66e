"""The understudy that runs the pass instead of the trainer, and leaves no trace in it.

An object of the trainer's class that shares its model and data and has copies of its counters and
containers.
"""

import copy
import sys
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerControl, TrainerState

from ..calibration import left_as_found, unsharded
from ..errors import ConfigError, DataError, warn

if TYPE_CHECKING:
    from transformers import Trainer


class TrainingBatches:
    """The batches that the trainer gives to its loss.

    Attributes:
        loader: a new data loader, whose generators the pass puts back.
    """

    def __init__(self, understudy: Any) -> None:
        self._understudy = understudy
        loader = understudy.get_train_dataloader()
        # Accelerate repeats samples to give all processes equally many. So the pass shares the data
        # out itself, except generated ones, which stay with their process.
        is_split = understudy.args.world_size > 1 and not is_online(understudy)
        self.loader = unsharded(loader) if is_split else loader

    def __iter__(self) -> Iterator[Any]:
        understudy = self._understudy
        for batch in self.loader:
            yield understudy._prepare_inputs(batch)
            # Online trainers generate data for several steps at once and choose those of a step by
            # this counter, which only `training_step` advances.
            if is_online(understudy):
                understudy._step += 1


def check_is_own(trainer: "Trainer", state: TrainerState) -> None:
    """Refuse the state of another trainer than the one whose model and data a callback reads.

    Args:
        trainer: that the callback was made for.
        state: of the trainer that calls it.

    Raises:
        ConfigError: if it is another's.
    """
    if state is not trainer.state:
        raise ConfigError(
            "this CalibrationCallback was made for another trainer, whose model and data it reads; "
            "make one for each: trainer.add_callback(CalibrationCallback(trainer))."
        )


def is_online(trainer: Any) -> bool:
    """Whether a trainer is one of TRL's that generate their data during training: GRPO, RLOO, …."""
    return hasattr(trainer, "_buffered_inputs") and hasattr(trainer, "_step")


def drop_meaningless_check(config: Any, trainer: "Trainer") -> None:
    """Switch off the check of a built-in step for losses whose gradient alone has a meaning.

    Policy-gradient losses are such, apart from their KL term, and TRL's dynamic fine-tuning, which
    weighs every token by its probability. Their value does not tell whether a step is good.
    """
    of_dft = getattr(trainer.args, "loss_type", None) == "dft"
    if (is_online(trainer) or of_dft) and config.checks_step:
        kind = "the loss 'dft'" if of_dft else f"a policy-gradient loss ({type(trainer).__name__})"
        config.check_step = False
        warn(
            f"the step that {config.method} starts with is not checked: the value of {kind} does not "
            "tell a good step from a bad one; set check_step=False to accept that, or another method."
        )


def understudy_of(trainer: "Trainer") -> Any:
    """A copy of the trainer for the pass, which can change its own attributes freely.

    Model, accelerator and data are shared, but a data set that can be read only once is copied.
    """
    understudy = object.__new__(type(trainer))
    copies: dict[int, Any] = {id(trainer): understudy}
    shared = ("train_dataset", "eval_dataset")
    for name, value in vars(trainer).items():
        vars(understudy)[name] = value if name in shared else _copied(value, copies)
    understudy.train_dataset = _rereadable(trainer.train_dataset)
    # Some collators make a generator when they are first used.
    understudy.data_collator = copy.copy(understudy.data_collator)
    understudy.current_gradient_accumulation_steps = 1
    understudy.args = args = copy.copy(trainer.args)
    args.report_to = []
    # The pass weighs the mean loss of each process's own batch.
    args.average_tokens_across_devices = False
    _on_one_device(understudy)
    # Losses that switch checkpointing off for a reference switch it on again with these options.
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if hasattr(args, name):
            vars(args)[name] = {**(getattr(args, name) or {}), "use_reentrant": False}
    understudy.callback_handler = copy.copy(trainer.callback_handler)
    understudy.callback_handler.callbacks = []
    return understudy


def loss_in_training(understudy: Any, model: nn.Module, inputs: Any) -> Any:
    """The trainer's loss of a batch.

    A loss of the user's gets the number of terms, as in training, since it may divide by that. That of the
    model is the mean of the terms without it; Transformers counts one more of every row for some models.
    """
    batch = copy.copy(inputs)
    if not _has_own_loss(understudy):
        return understudy.compute_loss(model, batch)
    (batch,), n_terms = understudy.get_batch_samples(iter([batch]), 1, understudy.args.device)
    return understudy.compute_loss(model, batch, num_items_in_batch=n_terms)


def _has_own_loss(trainer: Any) -> bool:
    """Whether the loss is neither Transformers' nor TRL's."""
    if trainer.compute_loss_func is not None or "compute_loss" in vars(trainer):
        return True
    owner = next(kind for kind in type(trainer).__mro__ if "compute_loss" in vars(kind))
    return owner.__module__.partition(".")[0] not in ("transformers", "trl")


def _on_one_device(understudy: Any) -> None:
    """Take batches of one device where the trainer splits those of several (`DataParallel`)."""
    n_devices = max(1, understudy.args.n_gpu)
    understudy.args._n_gpu = min(1, understudy.args.n_gpu)
    understudy._train_batch_size //= n_devices


def _copied(value: Any, copies: dict[int, Any]) -> Any:
    """Copy containers, records and bound methods recursively; share everything else.

    `copies` has every copy by the id of its original, which keeps identities and ends cycles.
    """
    if id(value) in copies:
        return copies[id(value)]
    if isinstance(value, types.MethodType):
        owner = copies.get(id(value.__self__))
        return value if owner is None else types.MethodType(value.__func__, owner)
    if not isinstance(value, TrainerState | TrainerControl | dict | list | deque | set):
        return value
    duplicate: Any = copy.copy(value)
    copies[id(value)] = duplicate
    if isinstance(value, list | deque):
        for i, item in enumerate(value):
            duplicate[i] = _copied(item, copies)
    elif not isinstance(value, set):
        entries = duplicate if isinstance(value, dict) else vars(duplicate)
        entries.update({key: _copied(item, copies) for key, item in entries.items()})
    return duplicate


def _rereadable(dataset: Any) -> Any:
    """The data set, or a copy of it if reading it would take samples away from training."""
    # `datasets` is slow to import, and is imported already if its data sets are used.
    rereadable = getattr(sys.modules.get("datasets"), "IterableDataset", ())
    if not isinstance(dataset, IterableDataset) or isinstance(dataset, rereadable):
        return dataset
    try:
        return copy.deepcopy(dataset)
    except Exception as error:
        raise DataError(
            f"the training data ({type(dataset).__name__}) are a stream that cannot be copied "
            f"({error}), so the calibration would take samples away from training; open the stream "
            "in __iter__, or calibrate first: calibrate(model, config, data).save(path), then "
            "calibration=path in the config."
        ) from error


@contextmanager
def as_in_training(model: nn.Module, seed: int) -> Iterator[None]:
    """Put the model and the random state back at the end, and let losses see a model in training.

    The modules are in eval mode, without dropout. Only the outermost one is in training mode, since
    losses ask it whether to evaluate, and may compute another loss then. Losses with a reference
    switch adapters, and PEFT changes `requires_grad` of parameters with that.
    """
    trainable = [(p, p.requires_grad) for p in model.parameters()]
    with left_as_found(model, None, seed):
        model.training = True
        try:
            yield
        finally:
            for parameter, requires_grad in trainable:
                parameter.requires_grad = requires_grad


@contextmanager
def bookkeeping(accelerator: Any) -> Iterator[None]:
    """Make the accelerator forget the data loader of the pass."""
    loaders = list(accelerator._dataloaders)
    try:
        yield
    finally:
        accelerator._dataloaders[:] = loaders
