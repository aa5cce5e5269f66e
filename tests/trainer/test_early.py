"""Starts before the optimiser: ranks and targets from data in `Trainer` and TRL, and on resume."""

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from transformers import Trainer, TrainerCallback

from peft_gradinit import CalibrationCallback, EvaConfig, LoraGAConfig, LoraOneConfig, init_report
from peft_gradinit.errors import ConfigError, NotInitializedError
from peft_gradinit.tuners import deferred_adapters
from tests.helpers import logits, pico_llama, quiet
from tests.trainer.runs import logs_of, models_of_search, mostly_slow, same_state, trainer_of
from tests.trainer.test_callback import BATCHES, InOrder, half_loss
from tests.trainer.trl_runs import losses_of
from tests.trainer.trl_runs import trainer_of as trl_trainer_of

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:the learning rate .* is far"),
    pytest.mark.filterwarnings("ignore:.*policy-gradient loss"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers` to `True`"),
]
METHODS = {c.method: c for c in (LoraGAConfig, LoraOneConfig, EvaConfig)}
AUTO = {"target_modules": "auto"}


def config_of(method, calibration="deferred", **options):
    values = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return METHODS[method](**{**values, **options}, calibration=calibration)


def deferred(method="LoRA-One", **options):
    return get_peft_model(pico_llama(), config_of(method, **(options or AUTO)))


def entries(model):
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {key: value.clone() for key, value in state.items()}


class AtBegin(TrainerCallback):
    """Keeps the adapter as it is at the first step, and which parameters the optimiser has."""

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.start = entries(model)
        self.ids = {id(p) for group in optimizer.param_groups for p in group["params"]}
        self.trainable = {id(p) for p in model.parameters() if p.requires_grad}


def run(trainer, resume=None, **options):
    at_begin = AtBegin()
    trainer.add_callback(CalibrationCallback(trainer, **options))
    trainer.add_callback(at_begin)
    trainer.train(resume_from_checkpoint=resume)
    return at_begin


@pytest.mark.parametrize("method", METHODS)
def test_ranks_and_targets_are_those_of_a_config_with_the_same_batches(method, tmp_path):
    trainer = trainer_of(tmp_path, model=deferred(method), cls=InOrder)
    got = run(trainer)
    want = get_peft_model(pico_llama(), config_of(method, quiet(BATCHES), **AUTO))
    assert same_state(got.start, entries(want))
    assert got.ids == got.trainable  # the optimiser has the new parameters
    assert len(set(init_report(trainer.model).ranks().values())) > 1
    assert not same_state(entries(trainer.model), got.start)  # and trains them


def test_eva_defers_with_its_defaults(tmp_path):
    trainer = trainer_of(tmp_path, model=deferred("EVA", r=4), cls=Trainer)
    run(trainer)
    assert len(set(init_report(trainer.model).ranks().values())) > 1


def test_autocast_and_the_trainers_own_loss_are_used(tmp_path):
    trainer = trainer_of(tmp_path, model=deferred(), cls=InOrder, bf16=True)
    trainer.compute_loss_func = half_loss
    got = run(trainer)

    def loss_fn(model, batch):
        batch = dict(batch)
        labels = batch.pop("labels")
        with torch.autocast("cpu", torch.bfloat16):
            return half_loss(model(**batch), labels)

    config = config_of("LoRA-One", quiet(BATCHES, loss_fn=loss_fn), **AUTO)
    assert same_state(got.start, entries(get_peft_model(pico_llama(), config)))


def test_the_run_is_that_of_a_model_calibrated_before(tmp_path):
    """The pass leaves no trace in batches, random state, logs and schedule."""
    trainer = trainer_of(tmp_path, model=deferred(lora_dropout=0.3, **AUTO))
    got = run(trainer)
    model = deferred(lora_dropout=0.3, **AUTO)
    set_peft_model_state_dict(model, got.start)
    other = trainer_of(tmp_path, model=model)
    other.train()
    assert all(torch.equal(a, b) for a, b in zip(trainer.batches, other.batches, strict=True))
    assert logs_of(trainer) == logs_of(other)
    assert same_state(entries(trainer.model), entries(other.model))


@pytest.mark.parametrize(
    ("kind", "method"),
    mostly_slow(
        [(kind, method) for kind in ("sft", "dpo", "kto", "grpo") for method in METHODS],
        quick=[("sft", "LoRA-One"), ("dpo", "LoRA-GA")],
    ),
)
def test_trl_trains_what_the_calibration_chose(kind, method, tmp_path):
    config = config_of(method, **AUTO)
    trainer = trl_trainer_of(kind, tmp_path, peft_config=config)
    run(trainer)
    assert len(set(init_report(trainer.model).ranks().values())) > 1
    assert deferred_adapters(trainer.model) == []
    assert len(losses_of(trainer)) == 3


@pytest.mark.parametrize("method", ["LoRA-GA", "LoRA-One"])
def test_a_resumed_run_takes_the_shapes_from_the_checkpoint(method, tmp_path, monkeypatch):
    options = {"cls": Trainer, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(tmp_path, model=deferred(method), **options)
    run(trainer)
    resumed = trainer_of(tmp_path / "resumed", model=deferred(method), **options)
    monkeypatch.setattr(
        "peft_gradinit.trainer.callback.initialize", lambda *_: pytest.fail("calibrated")
    )
    run(resumed, str(tmp_path / "checkpoint-2"))
    assert same_state(entries(resumed.model), entries(trainer.model))
    assert torch.equal(logits(resumed.model), logits(trainer.model))


def test_a_checkpoint_without_the_adapter_is_refused(tmp_path):
    options = {"cls": Trainer, "save_strategy": "steps", "save_steps": 2}
    run(trainer_of(tmp_path, **options))
    model = deferred()
    model.add_adapter("other", config_of("LoRA-One", **AUTO))
    resumed = trainer_of(tmp_path / "resumed", model=model, **options)
    with pytest.raises((NotInitializedError, RuntimeError, KeyError)):
        run(resumed, str(tmp_path / "checkpoint-2"))


def test_an_optimiser_of_the_users_own_is_refused(tmp_path):
    model = deferred()
    trainer = trainer_of(tmp_path, model=model, cls=Trainer)
    trainer.optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with pytest.raises(ConfigError, match=r"gets its ranks from the data.*SGD was made before"):
        run(trainer)


@pytest.mark.parametrize("layout", ["DeepSpeed", "FSDP1"])
def test_layouts_that_take_the_shapes_before_are_refused_by_name(layout, tmp_path, monkeypatch):
    monkeypatch.setattr("peft_gradinit.trainer.callback.shards_before_optimizer", lambda _: layout)
    trainer = trainer_of(tmp_path, model=deferred(), cls=Trainer)
    with pytest.raises(ConfigError, match=rf"but {layout} takes the shapes.*calibration=path"):
        run(trainer)


def test_a_callback_that_was_not_added_does_nothing(tmp_path):
    trainer = trainer_of(tmp_path, model=deferred(), cls=Trainer)
    CalibrationCallback(trainer)
    with pytest.raises(NotInitializedError):
        trainer.train()


def test_new_models_of_a_search_are_started_again(tmp_path):
    first, second = models_of_search(tmp_path, deferred)
    assert second is not first
    assert deferred_adapters(second) == []
