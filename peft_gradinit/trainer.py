"""The callback that starts deferred adapters inside `transformers.Trainer` and what is built on it.

At `on_train_begin` the optimiser exists and no step was taken. The pass needs the trainer's data and
its loss, and must leave no trace in it: neither in its counters and metrics, nor in its data loader,
nor in the random state. So it is not the trainer that runs it, but an understudy: an object of the
same class with the same attributes, of which it has its own where they are counters and containers.
"""

import copy
import dataclasses
import types
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, cast

import datasets
from peft import PeftModel
from torch import nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState

from .calibration import Calibration, is_sharded, left_as_found, unsharded
from .errors import ConfigError, DataError, NotInitializedError
from .tuners import GradInitModel, SVFitModel, initialize, waiting_adapters


class CalibrationCallback(TrainerCallback):
    """Starts the adapters made with `calibration="deferred"` when training begins.

    The data are the trainer's own training batches, in an order drawn from `seed`, and the loss is
    its own `compute_loss`: packing, padding-free batches, preference losses and the rewards of online
    methods included. The factors are written in place before the first step. The rest of the run is
    what it would be without the callback: batches, learning rates, optimiser, random state, logs.
    Only what your own functions change outside of the trainer is changed by the pass as well.

    A run that resumes from a checkpoint has its start from there and is not calibrated.

        trainer = SFTTrainer(model, ..., peft_config=LoraGAConfig(..., calibration="deferred"))
        trainer.add_callback(CalibrationCallback(trainer))
        trainer.train()

    Args:
        trainer: the trainer that the callback is added to.
        adapter_name: the adapter to start. Default: every one that waits for its start.
        max_tokens: budget in input tokens, padding not counted. Default: 65,536 if `max_batches` is
            not given either.
        max_batches: budget in batches of the trainer's data loader. Default: no limit of its own.
        estimator: `"sketch"` or `"dense"`, as in `Calibration`.
        seed: of the order of the batches, of the test matrices, and of everything random in them.

    Raises:
        ConfigError: if `trainer` is no `Trainer`, or an option has a value that cannot work.
    """

    def __init__(
        self,
        trainer: Trainer,
        *,
        adapter_name: str | None = None,
        max_tokens: int | None = None,
        max_batches: int | None = None,
        estimator: Literal["sketch", "dense"] = "sketch",
        seed: int = 0,
    ) -> None:
        if not isinstance(trainer, Trainer):
            raise ConfigError(
                f"CalibrationCallback needs the trainer, got {type(trainer).__name__}; make the trainer "
                "first, then trainer.add_callback(CalibrationCallback(trainer))."
            )
        self.trainer = trainer
        self.adapter_name = adapter_name
        self._calibration = Calibration(
            (), max_tokens=max_tokens, max_batches=max_batches, estimator=estimator, seed=seed
        )
        self._has_started = self._has_told = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Calibrate and fill the adapters that wait; `Trainer` calls this.

        Args:
            args: the trainer's arguments.
            state: its state; tells a resumed run.
            control: not used.
            kwargs: not used.

        Raises:
            ConfigError: if the model has no adapter of this package, or not the one asked for.
            NotInitializedError: if the run resumes from a checkpoint that lacks the adapter.
        """
        model = cast("nn.Module", self.trainer.accelerator.unwrap_model(self.trainer.model))
        peft_model = _peft_model(model)
        waiting = self._waiting(peft_model)
        if not waiting:
            self._tell_nothing_waits(state)
        elif state.global_step:
            raise NotInitializedError(
                f"training resumes at step {state.global_step}, but the checkpoint gave the adapters "
                f"{waiting} no start, and a new one would not fit the rest of the run; resume from a "
                "checkpoint that holds them, or train from the beginning."
            )
        for name in waiting:
            if name in waiting_adapters(peft_model):  # not filled as a copy of one before it
                self._start(model, peft_model, name)
        self._has_started = self._has_started or bool(waiting)

    def _waiting(self, peft_model: PeftModel) -> list[str]:
        waiting = waiting_adapters(peft_model)
        if self.adapter_name is None:
            return waiting
        if self.adapter_name not in peft_model.peft_config:
            raise ConfigError(
                f"CalibrationCallback was given adapter_name={self.adapter_name!r}; the model has "
                f"{sorted(peft_model.peft_config)}."
            )
        return [name for name in waiting if name == self.adapter_name]

    def _tell_nothing_waits(self, state: Any) -> None:
        if self._has_told or self._has_started or state.global_step:
            return
        self._has_told = True
        warnings.warn(
            "CalibrationCallback has nothing to do: every adapter has its start already. It serves "
            "adapters made with calibration='deferred'; remove the callback, or defer the calibration.",
            stacklevel=3,
        )

    def _start(self, model: nn.Module, peft_model: PeftModel, adapter_name: str) -> None:
        trainer = self.trainer
        _drop_meaningless_check(peft_model.peft_config[adapter_name], trainer)
        quiet = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
        wrapped: Any = trainer.model_wrapped
        # A sharded model runs by its wrapper alone.
        running = wrapped if is_sharded(wrapped) else model
        with _bookkeeping(trainer.accelerator), _as_in_training(running, self._calibration.seed):
            understudy = _understudy(trainer)
            calibration = dataclasses.replace(
                self._calibration,
                data=_TrainingBatches(understudy),
                loss_fn=lambda _, inputs: understudy.compute_loss(running, copy.copy(inputs)),
                loss_is_collective=True,  # losses of TRL gather their metrics
                accelerator=trainer.accelerator,
                progress=not quiet,
            )
            initialize(running if running is wrapped else peft_model, calibration, adapter_name)


class _TrainingBatches:
    """What the trainer's loss is given, batch by batch.

    Attributes:
        loader: a data loader of its own, whose generators the pass puts back.
    """

    def __init__(self, understudy: Any) -> None:
        self._understudy = understudy
        loader = understudy.get_train_dataloader()
        # What is generated for a process stays with it; other data are shared out anew, since
        # Accelerate repeats samples to make all parts equal.
        parted = understudy.args.world_size > 1 and not _is_online(understudy)
        self.loader = unsharded(loader) if parted else loader

    def __iter__(self) -> Iterator[Any]:
        understudy = self._understudy
        for batch in self.loader:
            yield understudy._prepare_inputs(batch)
            # They generate for several steps at once, and serve them by this count, which only
            # `training_step` advances.
            if _is_online(understudy):
                understudy._step += 1


def _peft_model(model: nn.Module) -> PeftModel:
    """The model that holds the adapters, wherever it is.

    Args:
        model: the trainer's, without the wrappers of parallel training.

    Returns:
        The `PeftModel` in it.

    Raises:
        ConfigError: if there is none with adapters of this package.
    """
    found = [m for m in model.modules() if isinstance(m, PeftModel)]
    for peft_model in found:
        if isinstance(peft_model.base_model, GradInitModel | SVFitModel):
            return peft_model
    kinds = [str(config.peft_type) for m in found for config in m.peft_config.values()]
    raise ConfigError(
        f"CalibrationCallback found no adapter of this package in {type(model).__name__} (adapters: "
        f"{kinds or None}), so training would not start from a calibration; pass a config such as "
        "peft_gradinit.LoraGAConfig(…, calibration='deferred') to get_peft_model or as peft_config, or "
        "remove the callback."
    )


def _is_online(trainer: Any) -> bool:
    """Whether it is a trainer of TRL's that generates its data as it goes: GRPO, RLOO, …."""
    return hasattr(trainer, "_buffered_inputs") and hasattr(trainer, "_step")


def _drop_meaningless_check(config: Any, trainer: Trainer) -> None:
    """Switch off the check of a built-in step where the value of the loss says nothing.

    Args:
        config: of a live adapter.
        trainer: where policy-gradient losses have the gradient, but not the value, of what they stand
            for: a step of any size leaves all but their KL term as it is.
    """
    if _is_online(trainer) and config.checks_step:
        config.check_step = False
        warnings.warn(
            f"the step that {config.method} starts with is not checked: the value of a policy-gradient "
            f"loss ({type(trainer).__name__}) does not tell a good step from a bad one; set "
            "check_step=False to accept that, or another method.",
            stacklevel=4,
        )


def _understudy(trainer: Trainer) -> Any:
    """A copy of the trainer that takes its place during the pass.

    Args:
        trainer: it is not changed by anything that the copy does to its own attributes.

    Returns:
        An object of the same class. Model, accelerator and data are shared; data sets that can be
        read only once are copied.
    """
    understudy = object.__new__(type(trainer))
    known: dict[int, Any] = {id(trainer): understudy}
    shared = {"train_dataset": trainer.train_dataset, "eval_dataset": trainer.eval_dataset}
    for name, value in vars(trainer).items():
        vars(understudy)[name] = value if name in shared else _own(value, known)
    understudy.train_dataset = _rereadable(trainer.train_dataset)
    # Some make a generator when they are first used.
    understudy.data_collator = copy.copy(understudy.data_collator)
    understudy.current_gradient_accumulation_steps = 1
    understudy.args = args = copy.copy(trainer.args)
    args.report_to = []
    # Losses that switch checkpointing off for a reference switch it on again by these.
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if hasattr(args, name):
            vars(args)[name] = {**(getattr(args, name) or {}), "use_reentrant": False}
    understudy.callback_handler = copy.copy(trainer.callback_handler)
    understudy.callback_handler.callbacks = []
    return understudy


def _own(value: Any, known: dict[int, Any]) -> Any:
    """Copy containers, records and bound methods all the way down; share everything else.

    Args:
        value: of an attribute, or inside of one.
        known: copies by the id of what they are copies of; keeps identities and ends cycles.

    Returns:
        The copy, or `value`.
    """
    if id(value) in known:
        return known[id(value)]
    if isinstance(value, types.MethodType):
        owner = known.get(id(value.__self__))
        return value if owner is None else types.MethodType(value.__func__, owner)
    if not isinstance(value, TrainerState | TrainerControl | dict | list | deque | set):
        return value
    own: Any = copy.copy(value)
    known[id(value)] = own
    if isinstance(value, list | deque):
        for i, item in enumerate(value):
            own[i] = _own(item, known)
    elif not isinstance(value, set):
        entries = own if isinstance(value, dict) else vars(own)
        entries.update({key: _own(item, known) for key, item in entries.items()})
    return own


def _rereadable(dataset: Any) -> Any:
    """A data set that can be read without taking samples away from training.

    Args:
        dataset: the training data.

    Returns:
        The data set itself if reading it changes nothing, else a copy.

    Raises:
        DataError: if it cannot be copied.
    """
    if not isinstance(dataset, IterableDataset) or isinstance(dataset, datasets.IterableDataset):
        return dataset
    try:
        return copy.deepcopy(dataset)
    except Exception as error:
        raise DataError(
            f"the training data ({type(dataset).__name__}) are a stream that cannot be copied "
            f"({error}), so the calibration would take samples away from training; open the stream in "
            "__iter__, or calibrate first: calibrate(model, config, data).save(path), then "
            "calibration=path in the config."
        ) from error


@contextmanager
def _as_in_training(model: nn.Module, seed: int) -> Iterator[None]:
    """Everything of the model, and the random state, comes back; losses see a model in training.

    The modules are in eval mode, without dropout. The outermost one says that it trains: losses ask
    it which way to go, and the way of evaluation may be another loss. Losses with a reference switch
    adapters, which in PEFT changes what is trainable.
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
def _bookkeeping(accelerator: Any) -> Iterator[None]:
    """The accelerator forgets the data loader of the pass, which may have ended early."""
    loaders, gradients = list(accelerator._dataloaders), accelerator.gradient_state
    references = gradients.dataloader_references
    try:
        yield
    finally:
        accelerator._dataloaders[:] = loaders
        gradients.dataloader_references = references
