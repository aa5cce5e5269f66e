"""`CalibrationCallback`: the start of deferred adapters, and the learning rate, in a `Trainer`.

A start that may change shapes, or decides the learning rate, comes before the optimiser is made,
by `Trainer.create_optimizer`; any other at `on_train_begin`, where sharded models run. The pass
needs the trainer's data and its loss, and must leave no trace in its counters, its metrics, its data
loader or the random state: an understudy runs it instead of the trainer.
"""

import dataclasses
from typing import TYPE_CHECKING, Any, Literal, cast

from peft import PeftModel
from torch import nn
from transformers import TrainerCallback

from ..calibration import Calibration
from ..errors import ConfigError, NotInitializedError, warn
from ..layouts import is_sharded
from ..records import init_report
from ..starts import GradInitConfig, SpectralConfig
from ..tuners import (
    WAYS_AROUND,
    GradInitModel,
    SVFitModel,
    adapter_hosts,
    deferred_adapters,
    initialize,
    suggest_learning_rate,
)
from .heads import check_head_rate, give_heads_a_rate, suggested_head_rate
from .logs import log_head_rate, log_start, logged_rate
from .optimizers import (
    SUGGESTED,
    MadeAt,
    before_optimizer,
    check_rate,
    check_takes_rate,
    is_supervised,
    other_than_adam,
    rescale_rates,
    shards_before_optimizer,
    whole_on_device,
)
from .understudy import (
    TrainingBatches,
    as_in_training,
    bookkeeping,
    check_is_own,
    drop_meaningless_check,
    loss_in_training,
    understudy_of,
)

if TYPE_CHECKING:
    from torch.optim import Optimizer
    from transformers import Trainer

_GIVEN_OPTIMIZER = (
    "the trainer was given an optimiser, which has its learning rate; make it with "
    "suggest_learning_rate(model).suggested, or let the trainer make one."
)


class CalibrationCallback(TrainerCallback):
    """Starts the adapters made with `calibration="deferred"` when training begins.

    The data are the trainer's own training batches, in an order drawn from `seed`, and the loss is
    its own `compute_loss`. So packing, padding-free batches, preference losses and the rewards of
    online methods work as in training. The rest of the run is the same as without the callback:
    batches, learning rates, optimiser, random state. But side effects of your own functions outside
    the trainer happen in the pass too.

    An adapter whose ranks or targets come from the data gets its start before the trainer makes the
    optimiser. FSDP1 and DeepSpeed take the model's shapes before that, and are refused by name.

    A run that resumes from a checkpoint has its start from there and is not calibrated, except
    under FSDP2 if ranks come from the data: the same data give the same shapes again.

        trainer = SFTTrainer(model, ..., peft_config=LoraOneConfig(..., calibration="deferred"))
        trainer.add_callback(CalibrationCallback(trainer, learning_rate="suggested"))
        trainer.train()

    Args:
        trainer: the trainer that the callback is added to.
        adapter_name: the adapter to start. Default: all deferred ones.
        max_tokens: budget in input tokens, padding not counted. Default: 65,536 if `max_batches` is
            not given either.
        max_batches: budget in batches of the trainer's data loader. Default: no limit.
        estimator: `"sketch"` or `"dense"`, as in `Calibration`.
        seed: seed of the order of the batches, the test matrices and everything else random.
        learning_rate: `"suggested"`: train at the rate of `suggest_learning_rate`, in place of that
            of the arguments, also with plain LoRA of PEFT. Default: keep that of the arguments,
            with a warning if it is far from the suggested range. For supervised training only.
        head_learning_rate: rate of the modules that are trained in full (`modules_to_save`, such as
            a new head), which are often trained at another one. `"suggested"`: from the size of
            the head's inputs in the first batches, for new linear heads. Default: that of the adapter.
        log: report loss, energy, seconds, rate and ranks of the start to what `report_to` names. On
            by default; `trainer.state.log_history` has them in any case.

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
        learning_rate: Literal["suggested"] | None = None,
        head_learning_rate: float | Literal["suggested"] | None = None,
        log: bool = True,
    ) -> None:
        from transformers import Trainer  # slow to import; users with a trainer have done so

        if not isinstance(trainer, Trainer):
            raise ConfigError(
                f"CalibrationCallback needs the trainer, got {type(trainer).__name__}; make the "
                "trainer first, then trainer.add_callback(CalibrationCallback(trainer))."
            )
        _check_rates(trainer, learning_rate, head_learning_rate)
        self.trainer = trainer
        self.adapter_name = adapter_name
        self.learning_rate, self.head_learning_rate = learning_rate, head_learning_rate
        self._head_rate: float | None = None  # the one that was found
        self.log = log
        self._calibration = Calibration(
            (), max_tokens=max_tokens, max_batches=max_batches, estimator=estimator, seed=seed
        )
        self._has_started = self._has_warned = self._has_told = False
        self._new: list[str] = []
        self._made_at: MadeAt | None = None
        before_optimizer(trainer, self._begin_early, self._adjust_optimizer)

    # Before the optimiser ---------------------------------------------------------------------

    def _begin_early(self) -> None:
        """Start adapters that have new shapes or decide the rate; `create_optimizer` calls this."""
        if self not in self.trainer.callback_handler.callbacks:
            return
        self._new = []
        peft_model = self._peft_model()
        waiting = self._waiting(peft_model)
        configs: list[Any] = [peft_model.peft_config[name] for name in waiting]
        reshapes = any(config.allocates_ranks for config in configs)
        sharding = shards_before_optimizer(self.trainer)
        if reshapes and sharding:
            raise ConfigError(
                f"the adapters {waiting} get their ranks from the data, but {sharding} takes the "
                f"shapes of the model before there are any; {WAYS_AROUND}."
            )
        decides = SUGGESTED in self._rates and not self.trainer.is_fsdp_enabled
        if waiting and (reshapes or decides):
            with whole_on_device(self.trainer, peft_model):
                self._start_all(waiting)
        if self.learning_rate is not None and not deferred_adapters(peft_model):
            self.trainer.args.learning_rate = self._suggested(peft_model)

    def _adjust_optimizer(self, optimizer: "Optimizer") -> None:
        if self not in self.trainer.callback_handler.callbacks:
            return
        n_heads = 0
        if self.head_learning_rate is not None:
            n_heads = give_heads_a_rate(optimizer, self._peft_model(), self._rate_of_heads())
        rates = [group["lr"] for group in optimizer.param_groups]
        self._made_at = MadeAt(self.trainer.args.learning_rate, rates, n_heads)
        if self.learning_rate is not None:
            check_takes_rate(self._made_at)

    def _rate_of_heads(self) -> float:
        if self.head_learning_rate != SUGGESTED:
            return cast("float", self.head_learning_rate)
        seed = self._calibration.seed
        self._head_rate = suggested_head_rate(self.trainer, self._model(), seed)
        return self._head_rate

    # When training begins ---------------------------------------------------------------------

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Calibrate and fill the deferred adapters; `Trainer` calls this.

        Args:
            args: not used.
            state: the trainer's state, which tells whether the run is resumed.
            control: not used.
            kwargs: not used.

        Raises:
            ConfigError: if the model has no adapter of this package, or not the one asked for; or
                if another trainer calls this than the one that the callback was made for.
            NotInitializedError: if the run resumes from a checkpoint that lacks the adapter.
        """
        check_is_own(self.trainer, state)
        peft_model = self._peft_model()
        waiting = self._waiting(peft_model)
        early = [] if self.trainer.is_fsdp_enabled else self._new
        if state.global_step and (waiting or early):
            raise NotInitializedError(
                f"training resumes at step {state.global_step}, but the checkpoint gave the "
                f"adapters {waiting or early} no start, and a new one would not fit the rest of the "
                "run; resume from a checkpoint that holds them, or train from the beginning."
            )
        if waiting:
            self._start_all(waiting)
        elif not self._new:
            self._warn_of_no_work(state)
        if self.learning_rate is not None:
            if self._made_at is None:
                raise ConfigError(_GIVEN_OPTIMIZER)
            rescale_rates(self.trainer, self._suggested(peft_model), self._made_at)
        if not state.global_step and (self._new or not self._has_told):
            self._tell(peft_model)
        self._new, self._has_told = [], True

    def _tell(self, peft_model: PeftModel) -> None:
        """Log the starts, and compare the rate of the run with the suggested one."""
        found = {n: init_report(peft_model, n) for n in self._new or [self._adapter(peft_model)]}
        reports = {name: report for name, report in found.items() if report}
        rates = [report.learning_rate for report in reports.values() if report.learning_rate]
        if rates and self.learning_rate is None:
            check_rate(self.trainer, rates[0])
        log_start(self.trainer, reports, report=self.log)
        if self._head_rate is not None:
            log_head_rate(self.trainer, self._head_rate, report=self.log)

    def _suggested(self, peft_model: PeftModel) -> float:
        """The rate of the start; a resumed run has it in its logs."""
        name = self._adapter(peft_model)
        logged = logged_rate(self.trainer, name) if init_report(peft_model, name) is None else None
        return logged or suggest_learning_rate(peft_model, name).suggested

    def _adapter(self, peft_model: PeftModel) -> str:
        if self.adapter_name is not None:
            return self.adapter_name
        host: Any = peft_model
        is_peft = isinstance(host, PeftModel)  # Transformers has a method of that name
        return (host.active_adapters if is_peft else host.active_adapters())[0]

    def _peft_model(self) -> PeftModel:
        return _peft_model(self._model(), any_type=self._rates != (None, None))

    @property
    def _rates(self) -> tuple[object, object]:
        return self.learning_rate, self.head_learning_rate

    def _model(self) -> nn.Module:
        return cast("nn.Module", self.trainer.accelerator.unwrap_model(self.trainer.model))

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
        asked = self._rates != (None, None)
        if self._has_warned or self._has_started or state.global_step or asked:
            return
        self._has_warned = True
        warn(
            "CalibrationCallback has nothing to do: every adapter has its start already. It serves "
            "adapters made with calibration='deferred'; remove the callback, or defer the "
            "calibration."
        )

    def _start_all(self, waiting: list[str]) -> None:
        peft_model = self._peft_model()
        for name in waiting:
            if name in deferred_adapters(peft_model):  # a copy of an earlier one is filled by now
                self._start(self._model(), peft_model, name)
        self._new, self._has_started = waiting, True

    def _start(self, model: nn.Module, peft_model: PeftModel, adapter_name: str) -> None:
        trainer = self.trainer
        drop_meaningless_check(peft_model.peft_config[adapter_name], trainer)
        quiet = trainer.args.disable_tqdm or not trainer.is_local_process_zero()
        wrapped: Any = trainer.model_wrapped
        # A sharded model runs only through its wrapper.
        running = wrapped if is_sharded(wrapped) else model
        with bookkeeping(trainer.accelerator), as_in_training(running, self._calibration.seed):
            understudy = understudy_of(trainer)
            calibration = dataclasses.replace(
                self._calibration,
                data=TrainingBatches(understudy),
                loss_fn=lambda _, inputs: loss_in_training(understudy, running, inputs),
                loss_is_collective=True,  # losses of TRL gather their metrics
                accelerator=trainer.accelerator,
                progress=not quiet,
            )
            initialize(running if running is wrapped else peft_model, calibration, adapter_name)


def _peft_model(model: nn.Module, *, any_type: bool) -> PeftModel:
    """The model with adapters of this package, or of `any_type`, in the trainer's model."""
    hosts = cast("list[PeftModel]", adapter_hosts(model))
    for host in hosts:
        if any_type or _has_ours(host):
            return host
    kinds = [str(config.peft_type) for host in hosts for config in host.peft_config.values()]
    raise ConfigError(
        f"CalibrationCallback found no adapter of this package in {type(model).__name__} "
        f"(adapters: {kinds or None}), so training would not start from a calibration; pass a "
        "config such as peft_gradinit.LoraGAConfig(…, calibration='deferred') to get_peft_model or "
        "as peft_config, or remove the callback."
    )


def _has_ours(host: PeftModel) -> bool:
    if isinstance(host, PeftModel):
        return isinstance(host.base_model, GradInitModel | SVFitModel)
    configs = host.peft_config.values()
    return any(isinstance(config, GradInitConfig | SpectralConfig) for config in configs)


def _check_rates(trainer: "Trainer", rate: object, head_rate: object) -> None:
    if rate not in (None, SUGGESTED):
        raise ConfigError(
            f"learning_rate must be {SUGGESTED!r} or None, got {rate!r}; a rate of your own belongs "
            "into the trainer's arguments."
        )
    check_head_rate(trainer, head_rate)
    if rate is None and head_rate is None:
        return
    if rate is not None and not is_supervised(trainer):
        raise ConfigError(
            f"learning_rate={SUGGESTED!r} is for supervised training; preference and "
            f"policy-gradient losses ({type(trainer).__name__}) take rates that are lower by one or "
            "two powers of ten: set learning_rate in the trainer's arguments."
        )
    if trainer.is_deepspeed_enabled:
        raise ConfigError(
            "DeepSpeed takes the learning rate before the callback knows one; set it in the "
            "trainer's arguments, from suggest_learning_rate(model) once the adapter has its start."
        )
    if trainer.optimizer is not None:
        raise ConfigError(_GIVEN_OPTIMIZER)
    if rate is not None and (kind := other_than_adam(trainer)):
        raise ConfigError(
            f"learning_rate={SUGGESTED!r} is for Adam and its kin, but the trainer makes {kind}; "
            "set a rate for it (suggest_learning_rate knows those of optimisers of pairs), or leave "
            "its option out."
        )
