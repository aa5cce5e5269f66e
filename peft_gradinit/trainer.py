"""The callback that starts deferred adapters in `transformers.Trainer` and its subclasses.

At `on_train_begin` the optimiser exists and no step was taken. The pass needs the trainer's data
and its loss, and must leave no trace in its counters, its metrics, its data loader or the random
state. So an understudy runs the pass instead of the trainer: an object of the same class that
shares the trainer's model and data and has copies of its counters and containers.
"""

import copy
import dataclasses
import sys
import types
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal, cast

from peft import PeftModel
from torch import nn
from torch.utils.data import IterableDataset
from transformers import TrainerCallback, TrainerControl, TrainerState

from .calibration import Calibration, left_as_found, unsharded
from .errors import ConfigError, DataError, NotInitializedError, warn
from .layouts import is_sharded
from .tuners import GradInitModel, SVFitModel, deferred_adapters, initialize

if TYPE_CHECKING:
    from transformers import Trainer


class CalibrationCallback(TrainerCallback):
    """Starts the adapters made with `calibration="deferred"` when training begins.

    The data are the trainer's own training batches, in an order drawn from `seed`, and the loss is
    its own `compute_loss`. So packing, padding-free batches, preference losses and the rewards of
    online methods work as in training. The factors are written in place before the first step. The
    rest of the run is the same as without the callback: batches, learning rates, optimiser, random
    state, logs. But side effects of your own functions outside the trainer happen in the pass too.

    A run that resumes from a checkpoint has its start from there and is not calibrated.

        trainer = SFTTrainer(model, ..., peft_config=LoraGAConfig(..., calibration="deferred"))
        trainer.add_callback(CalibrationCallback(trainer))
        trainer.train()

    Args:
        trainer: the trainer that the callback is added to.
        adapter_name: the adapter to start. Default: all deferred ones.
        max_tokens: budget in input tokens, padding not counted. Default: 65,536 if `max_batches` is
            not given either.
        max_batches: budget in batches of the trainer's data loader. Default: no limit.
        estimator: `"sketch"` or `"dense"`, as in `Calibration`.
        seed: seed of the order of the batches, the test matrices and everything else random.

    Raises:
        ConfigError: if `trainer` is no `Trainer`, or an option has a value that cannot work.
    """

    def __init__(
        self,
        trainer: "Trainer",
        *,
        adapter_name: str | None = None,
        max_tokens: int | None = None,
        max_batches: int | None = None,
        estimator: Literal["sketch", "dense"] = "sketch",
        seed: int = 0,
    ) -> None:
        from transformers import Trainer  # slow to import; users with a trainer have done so

        if not isinstance(trainer, Trainer):
            raise ConfigError(
                f"CalibrationCallback needs the trainer, got {type(trainer).__name__}; make the "
                "trainer first, then trainer.add_callback(CalibrationCallback(trainer))."
            )
        self.trainer = trainer
        self.adapter_name = adapter_name
        self._calibration = Calibration(
            (), max_tokens=max_tokens, max_batches=max_batches, estimator=estimator, seed=seed
        )
        self._has_started = self._has_warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Calibrate and fill the deferred adapters; `Trainer` calls this.

        Args:
            args: not used.
            state: the trainer's state, which tells whether the run is resumed.
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
            self._warn_of_no_work(state)
        elif state.global_step:
            raise NotInitializedError(
                f"training resumes at step {state.global_step}, but the checkpoint gave the "
                f"adapters {waiting} no start, and a new one would not fit the rest of the run; "
                "resume from a checkpoint that holds them, or train from the beginning."
            )
        for name in waiting:
            if name in deferred_adapters(peft_model):  # a copy of an earlier one is filled by now
                self._start(model, peft_model, name)
        self._has_started = self._has_started or bool(waiting)

    def _waiting(self, peft_model: PeftModel) -> list[str]:
        waiting = deferred_adapters(peft_model)
        if self.adapter_name is None:
            return waiting
        if self.adapter_name not in peft_model.peft_config:
            raise ConfigError(
                f"CalibrationCallback was given adapter_name={self.adapter_name!r}; the model has "
                f"{sorted(peft_model.peft_config)}."
            )
        return [name for name in waiting if name == self.adapter_name]

    def _warn_of_no_work(self, state: Any) -> None:
        if self._has_warned or self._has_started or state.global_step:
            return
        self._has_warned = True
        warn(
            "CalibrationCallback has nothing to do: every adapter has its start already. It serves "
            "adapters made with calibration='deferred'; remove the callback, or defer the "
            "calibration."
        )

    def _start(self, model: nn.Module, peft_model: PeftModel, adapter_name: str) -> None:
        trainer = self.trainer
        _drop_meaningless_check(peft_model.peft_config[adapter_name], trainer)
        quiet = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
        wrapped: Any = trainer.model_wrapped
        # A sharded model runs only through its wrapper.
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
    """The batches that the trainer gives to its loss.

    Attributes:
        loader: a new data loader, whose generators the pass puts back.
    """

    def __init__(self, understudy: Any) -> None:
        self._understudy = understudy
        loader = understudy.get_train_dataloader()
        # Accelerate repeats samples to give all processes equally many. So the pass shares the data
        # out itself, except generated ones, which stay with their process.
        is_split = understudy.args.world_size > 1 and not _is_online(understudy)
        self.loader = unsharded(loader) if is_split else loader

    def __iter__(self) -> Iterator[Any]:
        understudy = self._understudy
        for batch in self.loader:
            yield understudy._prepare_inputs(batch)
            # Online trainers generate data for several steps at once and choose those of a step by
            # this counter, which only `training_step` advances.
            if _is_online(understudy):
                understudy._step += 1


def _peft_model(model: nn.Module) -> PeftModel:
    """The `PeftModel` with adapters of this package in the trainer's model."""
    peft_models = [m for m in model.modules() if isinstance(m, PeftModel)]
    for peft_model in peft_models:
        if isinstance(peft_model.base_model, GradInitModel | SVFitModel):
            return peft_model
    kinds = [str(config.peft_type) for m in peft_models for config in m.peft_config.values()]
    raise ConfigError(
        f"CalibrationCallback found no adapter of this package in {type(model).__name__} "
        f"(adapters: {kinds or None}), so training would not start from a calibration; pass a "
        "config such as peft_gradinit.LoraGAConfig(…, calibration='deferred') to get_peft_model or "
        "as peft_config, or remove the callback."
    )


def _is_online(trainer: Any) -> bool:
    """Whether a trainer is one of TRL's that generate their data during training: GRPO, RLOO, …."""
    return hasattr(trainer, "_buffered_inputs") and hasattr(trainer, "_step")


def _drop_meaningless_check(config: Any, trainer: "Trainer") -> None:
    """Switch off the check of a built-in step for policy-gradient losses.

    Only the gradient of such a loss has a meaning, apart from its KL term. Its value does not tell
    whether a step is good.
    """
    if _is_online(trainer) and config.checks_step:
        config.check_step = False
        warn(
            f"the step that {config.method} starts with is not checked: the value of a "
            f"policy-gradient loss ({type(trainer).__name__}) does not tell a good step from a bad "
            "one; set check_step=False to accept that, or another method."
        )


def _understudy(trainer: "Trainer") -> Any:
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
    # Losses that switch checkpointing off for a reference switch it on again with these options.
    for name in ("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"):
        if hasattr(args, name):
            vars(args)[name] = {**(getattr(args, name) or {}), "use_reentrant": False}
    understudy.callback_handler = copy.copy(trainer.callback_handler)
    understudy.callback_handler.callbacks = []
    return understudy


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
def _as_in_training(model: nn.Module, seed: int) -> Iterator[None]:
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
def _bookkeeping(accelerator: Any) -> Iterator[None]:
    """Make the accelerator forget the data loader of the pass, which may not be read to its end."""
    loaders, gradients = list(accelerator._dataloaders), accelerator.gradient_state
    references = gradients.dataloader_references
    try:
        yield
    finally:
        accelerator._dataloaders[:] = loaders
        gradients.dataloader_references = references
