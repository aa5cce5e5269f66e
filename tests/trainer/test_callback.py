"""What the callback starts, from which data and loss, and what it says when there is nothing to do."""

import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback

from peft_gradinit import (
    CalibrationCallback,
    SVFitConfig,
    init_report,
    initialize,
)
from peft_gradinit.errors import ConfigError, NotInitializedError
from peft_gradinit.tuners import deferred_adapters
from tests.helpers import (
    adapted,
    anchors,
    logits,
    lora_ga,
    pad,
    pico_gpt2,
    pico_llama,
    quiet,
    relative_error,
    same_factors,
)
from tests.trainer.runs import ROWS, models_of_search, trainer_of

BATCHES = [pad(ROWS[i : i + 4]) for i in range(0, len(ROWS), 4)]


class InOrder(Trainer):
    """Samples come in their order; Transformers before 5.2 has no option for it."""

    def _get_train_sampler(self, train_dataset=None):
        return SequentialSampler(self.train_dataset if train_dataset is None else train_dataset)


IN_ORDER = {"cls": InOrder}


def deferred(model=None, **options):
    return adapted(model or pico_llama(), lora_ga(calibration="deferred", **options))


def started(trainer, **options):
    """The trainer's model after the beginning of training."""
    trainer.add_callback(CalibrationCallback(trainer, **options))
    trainer.add_callback(_Stop())
    trainer.train()
    return trainer.model


class _Stop(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        raise StopIteration


def begin(trainer, **options):
    with pytest.raises(StopIteration):
        started(trainer, **options)
    return trainer.model


MODELS = {
    "llama": lambda: deferred(),
    "rslora": lambda: deferred(use_rslora=True),
    "gpt2": lambda: deferred(pico_gpt2(), target_modules=["c_attn", "c_proj", "c_fc"]),
    "bf16": lambda: deferred(pico_llama().to(torch.bfloat16)),
    "fp16": lambda: deferred(pico_llama().to(torch.float16)),
    "half-tokens": lambda: deferred(),
}


def half_loss(outputs, labels, num_items_in_batch=None):
    """A loss of the user's own: the first half of every sequence does not count."""
    labels = labels.clone()
    labels[:, : labels.shape[1] // 2] = -100
    return nn.functional.cross_entropy(
        outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )


class HalfLoss(InOrder):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return half_loss(model(**inputs), labels)


@pytest.mark.parametrize("estimator", ["sketch", "dense"])
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore:LoRA-GA needs")
def test_start_is_that_of_initialize_on_the_same_batches_and_loss(kind, estimator, tmp_path):
    def loss_fn(model, batch):
        if kind == "half-tokens":
            return half_loss(model(batch["input_ids"], batch["attention_mask"]), batch["labels"])
        return model(**batch).loss

    options = {"cls": HalfLoss} if kind == "half-tokens" else IN_ORDER
    got = begin(trainer_of(tmp_path, model=MODELS[kind](), **options), estimator=estimator)
    want = MODELS[kind]()
    initialize(want, quiet(BATCHES, loss_fn=loss_fn, estimator=estimator))
    assert same_factors(anchors(got), anchors(want))


def test_losses_given_as_a_function_and_label_smoothing_are_used(tmp_path):
    plain = begin(trainer_of(tmp_path, **IN_ORDER))
    trainer = trainer_of(tmp_path, **IN_ORDER)
    trainer.compute_loss_func = half_loss
    by_function = begin(trainer)
    by_override = begin(trainer_of(tmp_path, cls=HalfLoss))
    assert same_factors(anchors(by_function), anchors(by_override))
    assert not same_factors(anchors(by_function), anchors(plain))
    smoothed = begin(trainer_of(tmp_path, label_smoothing_factor=0.3, **IN_ORDER))
    assert not same_factors(anchors(smoothed), anchors(plain))


def loss_of_sum(outputs, labels, num_items_in_batch):
    logits = outputs.logits[:, :-1].flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum")
    return loss / num_items_in_batch


class LossOfSum(InOrder):
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        labels = inputs.pop("labels")
        return loss_of_sum(model(**inputs), labels, num_items_in_batch)


def pad_from_second(rows):
    """Rows whose first label does not count; Transformers 5.2 counts it for functions."""
    batch = pad(rows)
    batch["labels"][:, 0] = -100
    return batch


@pytest.mark.parametrize("given", ["override", "function"])
def test_losses_that_divide_by_the_number_of_terms_get_it(given, tmp_path):
    options = {"cls": LossOfSum if given == "override" else InOrder, "collator": pad_from_second}
    trainer = trainer_of(tmp_path, **options)
    if given == "function":
        trainer.compute_loss_func = loss_of_sum
    got, want = begin(trainer), begin(trainer_of(tmp_path, **IN_ORDER, collator=pad_from_second))
    assert init_report(got).facts.loss == pytest.approx(init_report(want).facts.loss)
    for name, (A, B) in anchors(want).items():
        assert relative_error(anchors(got)[name][1] @ anchors(got)[name][0], B @ A) <= 1e-4


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_checkpointing_accumulation_and_dropout_do_not_change_the_start(reentrant, tmp_path):
    want = begin(trainer_of(tmp_path, **IN_ORDER))
    got = begin(
        trainer_of(
            tmp_path,
            model=deferred(lora_dropout=0.4),
            gradient_accumulation_steps=2,
            gradient_checkpointing=True,
            gradient_checkpointing_kwargs={"use_reentrant": reentrant},
            **IN_ORDER,
        )
    )
    assert same_factors(anchors(got), anchors(want))


def test_autocast_of_the_trainer_is_that_of_the_pass(tmp_path):
    def loss_fn(model, batch):
        with torch.autocast("cpu", torch.bfloat16):
            return model(**batch).loss

    got = begin(trainer_of(tmp_path, bf16=True, **IN_ORDER))
    want, plain = deferred(), begin(trainer_of(tmp_path, **IN_ORDER))
    initialize(want, quiet(BATCHES, loss_fn=loss_fn))
    assert same_factors(anchors(got), anchors(want))
    assert not same_factors(anchors(got), anchors(plain))


def test_budget_and_seed_are_those_of_the_callback(tmp_path):
    model = begin(trainer_of(tmp_path), max_batches=2)
    report = model.base_model.init_report["default"]
    assert (report.facts.n_batches, report.facts.stopped_by) == (2, "max_batches")
    again = begin(trainer_of(tmp_path), max_batches=2)
    other = begin(trainer_of(tmp_path), max_batches=2, seed=1)
    assert same_factors(anchors(model), anchors(again))
    assert not same_factors(anchors(model), anchors(other))  # it shuffles by the seed
    model = begin(trainer_of(tmp_path), max_tokens=30)
    assert model.base_model.init_report["default"].facts.stopped_by == "max_tokens"


def test_batches_of_data_parallel_are_those_of_one_device(tmp_path):
    """Without a launcher, `Trainer` splits a batch of all devices; the pass runs on one of them."""
    trainer = trainer_of(tmp_path, per_device_train_batch_size=2)
    trainer.args._n_gpu = 3
    trainer._train_batch_size = trainer.args.train_batch_size
    assert trainer._train_batch_size == 6
    got = begin(trainer)
    assert trainer.args.n_gpu == 3
    assert trainer.args.train_batch_size == trainer._train_batch_size == 6
    want = begin(trainer_of(tmp_path, per_device_train_batch_size=2))
    assert same_factors(anchors(got), anchors(want))
    facts = [m.base_model.init_report["default"].facts for m in (got, want)]
    assert facts[0].n_batches == facts[1].n_batches == 12


def test_only_deferred_adapters_start(tmp_path):
    model = adapted(pico_llama(), lora_ga())
    model.add_adapter("second", lora_ga(calibration="deferred"))
    model.add_adapter("third", lora_ga(calibration="deferred"))
    first = anchors(model)
    trainer = trainer_of(tmp_path, model=model, cls=Trainer)
    begin(trainer, adapter_name="second")
    assert deferred_adapters(model) == ["third"]
    assert same_factors(anchors(model), first)
    begin(trainer_of(tmp_path, model=model, cls=Trainer))
    assert deferred_adapters(model) == []
    assert not same_factors(anchors(model, "second"), first)
    assert same_factors(anchors(model, "second"), anchors(model, "third"))


@pytest.mark.parametrize("rate", [None, "suggested"])
def test_an_adapter_that_transformers_added_starts_and_trains_like_one_of_peft(rate, tmp_path):
    hosted, wrapped = pico_llama(), deferred()
    hosted.add_adapter(lora_ga(calibration="deferred"))
    for model in (hosted, wrapped):
        trainer = trainer_of(tmp_path, model=model, cls=Trainer, max_steps=3)
        trainer.add_callback(CalibrationCallback(trainer, learning_rate=rate))
        trainer.train()
    assert deferred_adapters(hosted) == []
    assert torch.equal(logits(hosted), logits(wrapped))


def test_second_training_and_new_models_of_a_search(tmp_path):
    trainer = trainer_of(tmp_path, cls=Trainer)
    trainer.add_callback(CalibrationCallback(trainer))
    trainer.train()
    after = logits(trainer.model)
    trainer.train()  # goes on from the trained adapter, without a warning
    assert relative_error(logits(trainer.model), after) > 1e-4
    first, second = models_of_search(tmp_path, deferred)
    assert second is not first
    assert deferred_adapters(second) == []


class Wrapper(nn.Module):
    """A model that has the adapters inside."""

    def __init__(self):
        super().__init__()
        self.inner = deferred()
        self.dropout = nn.Dropout(0.5)

    def forward(self, **inputs):
        outputs = self.inner(**inputs)
        return {"loss": outputs.loss, "seen": self.dropout(outputs.logits)}


def test_adapters_inside_of_another_model_are_found(tmp_path):
    want = begin(trainer_of(tmp_path, **IN_ORDER))
    got = begin(trainer_of(tmp_path, model=Wrapper(), **IN_ORDER))
    assert same_factors(anchors(got.inner), anchors(want))
    assert got.dropout.training


def test_nothing_to_start_is_said_once(tmp_path):
    for model, rate in ((adapted(pico_llama()), 1e-2), (svfit(), 1e-1)):
        trainer = trainer_of(tmp_path, model=model, cls=Trainer, learning_rate=rate)
        trainer.add_callback(CalibrationCallback(trainer))
        with pytest.warns(UserWarning, match="every adapter has its start already"):
            trainer.train()
        trainer.train()  # warnings are errors here


def svfit():
    return get_peft_model(pico_llama(), SVFitConfig(r=4, target_modules="all-linear"))


@pytest.mark.parametrize("kind", ["lora", "none"])
def test_models_without_an_adapter_of_this_package_are_refused(kind, tmp_path):
    model = pico_llama()
    if kind == "lora":
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    trainer = trainer_of(tmp_path, model=model, cls=Trainer)
    trainer.add_callback(CalibrationCallback(trainer))
    found = "LORA" if kind == "lora" else "None"
    with pytest.raises(ConfigError, match=rf"found no adapter of this package in .*{found}"):
        trainer.train()


def test_a_callback_of_another_trainer_is_refused(tmp_path):
    """As in a loop over folds that makes it once; it would read the model and the data of the first."""
    first, second = (trainer_of(tmp_path, model=deferred(), cls=Trainer) for _ in range(2))
    callback = CalibrationCallback(first)
    second.add_callback(callback)
    with pytest.raises(ConfigError, match=r"made for another trainer.*make one for each"):
        second.train()
    assert deferred_adapters(first.model)
    first.add_callback(callback)
    first.train()
    assert not deferred_adapters(first.model)


def test_wrong_arguments_are_refused_at_once(tmp_path):
    with pytest.raises(ConfigError, match=r"needs the trainer, got PeftModel.*add_callback"):
        CalibrationCallback(deferred())
    trainer = trainer_of(tmp_path, cls=Trainer)
    with pytest.raises(ConfigError, match="estimator must be 'sketch' or 'dense', got 'exact'"):
        CalibrationCallback(trainer, estimator="exact")
    with pytest.raises(ConfigError, match="max_tokens must be a positive integer, got 0"):
        CalibrationCallback(trainer, max_tokens=0)
    trainer.add_callback(CalibrationCallback(trainer, adapter_name="other"))
    with pytest.raises(ConfigError, match=r"adapter_name='other'; the model has \['default'\]"):
        trainer.train()


def test_resumed_run_is_not_calibrated(tmp_path, monkeypatch):
    options = {"cls": Trainer, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(tmp_path, **options)
    trainer.add_callback(CalibrationCallback(trainer))
    trainer.train()
    resumed = trainer_of(tmp_path / "resumed", **options)
    resumed.add_callback(CalibrationCallback(resumed))
    monkeypatch.setattr(
        "peft_gradinit.trainer.callback.initialize", lambda *_: pytest.fail("calibrated")
    )
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(logits(resumed.model), logits(trainer.model))


def test_checkpoint_without_the_adapter_is_refused(tmp_path):
    options = {"cls": Trainer, "save_strategy": "steps", "save_steps": 2}
    trainer = trainer_of(tmp_path, **options)
    trainer.add_callback(CalibrationCallback(trainer))
    trainer.train()
    model = deferred()
    model.add_adapter("other", lora_ga(calibration="deferred"))
    resumed = trainer_of(tmp_path / "resumed", model=model, **options)
    resumed.add_callback(CalibrationCallback(resumed))
    with pytest.raises(NotInitializedError, match=r"resumes at step 2.*\['other'\] no start"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))


def test_progress_follows_the_trainer(tmp_path, capsys):
    begin(trainer_of(tmp_path, disable_tqdm=True))
    assert "calibration" not in capsys.readouterr().err
    begin(trainer_of(tmp_path, disable_tqdm=False))
    assert "calibration: 100%" in capsys.readouterr().err


def test_a_report_tells_what_was_read(tmp_path):
    report = begin(trainer_of(tmp_path, **IN_ORDER)).base_model.init_report["default"]
    n_tokens = sum(len(row) for row in ROWS)
    facts = dataclasses.asdict(report.facts)
    assert (facts["n_sequences"], facts["n_tokens"]) == (len(ROWS), n_tokens)
    assert facts["loss_weight"] == n_tokens - len(ROWS)  # the first label has no prediction
