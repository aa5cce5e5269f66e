"""Runs of `transformers.Trainer` with and without the calibration pass, to compare them."""

import pytest
import torch
from transformers import Trainer, TrainerCallback, TrainingArguments

from peft_gradinit import CalibrationCallback
from peft_gradinit.tuners.lora.deferred import deferred_adapters, mark_started
from tests.helpers import adapted, lora_ga, pad, pico_llama, rows_of, token_batches

ROWS = rows_of(token_batches(24))


class Observed(Trainer):
    """Writes down the batches that training sees, and counts and logs inside of its loss."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.batches = []
        self.n_losses = 0
        self.by_mode = {"train": [], "eval": []}

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.batches.append(inputs["input_ids"].clone())
        return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.n_losses += 1
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.by_mode["train" if model.training else "eval"].append(loss.item())
        self.log({"inner": loss.item()})
        return loss


class Recorder(TrainerCallback):
    """Keeps the adapter as it is when training begins, and counts what is logged."""

    def __init__(self):
        self.n_logs = 0

    def on_log(self, *args, **kwargs):
        self.n_logs += 1

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.start = {name: value.clone() for name, value in model.state_dict().items()}
        self.optimizer_parameters = [id(p) for g in optimizer.param_groups for p in g["params"]]
        self.optimizer_state = dict(optimizer.state)
        self.rng = torch.get_rng_state()
        self.initial_seed = torch.initial_seed()


class PutStart(TrainerCallback):
    """Gives deferred adapters a recorded start, without a pass."""

    def __init__(self, start):
        self.start = start

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        model.load_state_dict(self.start)
        for name in deferred_adapters(model):
            for layer in model.modules():
                mark_started(layer, name)


def arguments(directory, **options):
    values = {
        "max_steps": 5,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(directory), **{**values, **options})


def trainer_of(
    directory, *, model=None, cls=Observed, data=ROWS, collator=pad, lora_dropout=0.0, **options
):
    if model is None:
        model = adapted(pico_llama(), lora_ga(calibration="deferred", lora_dropout=lora_dropout))
    return cls(model, arguments(directory, **options), train_dataset=data, data_collator=collator)


def calibrated_run(trainer, **options):
    """Train with the callback; returns what the adapter was when training began."""
    recorder = Recorder()
    trainer.add_callback(CalibrationCallback(trainer, log=False, **options))
    trainer.add_callback(recorder)
    trainer.train()
    return recorder


def uncalibrated_run(trainer, start):
    """Train from a recorded start, without a calibration."""
    recorder = Recorder()
    trainer.add_callback(PutStart(start))
    trainer.add_callback(recorder)
    trainer.train()
    return recorder


def models_of_search(directory, make):
    """The models of two trials of a hyperparameter search, each trained with the callback."""
    searching = Trainer(
        args=arguments(directory),
        train_dataset=ROWS,
        data_collator=pad,
        model_init=lambda: make(),  # Trainer counts the arguments of a function
    )
    searching.add_callback(CalibrationCallback(searching))
    models = []
    for _ in range(2):
        searching.train()
        models.append(searching.model)
    return models


def logs_of(trainer):
    """Everything logged, except times and the report on the start."""
    timed = ("runtime", "per_second", "step_time", "flos")
    return [
        {k: v for k, v in log.items() if not any(part in k for part in timed)}
        for log in trainer.state.log_history
        if not any(key.startswith("calibration/") for key in log)
    ]


def same_state(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def mostly_slow(cases, quick):
    """Parameters for `parametrize`, of which those that are not in `quick` are marked slow."""
    return [c if c in quick else pytest.param(*_tuple(c), marks=pytest.mark.slow) for c in cases]


def _tuple(case):
    return case if isinstance(case, tuple) else (case,)
