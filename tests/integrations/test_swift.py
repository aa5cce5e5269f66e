"""The plug-in as ms-swift uses it: a file that registers, a tuner's class, a callback's class."""

from types import SimpleNamespace

import pytest
from peft import LoraModel
from transformers import Trainer

from peft_gradinit import METHODS, init_report
from tests.helpers import logits, pico_llama
from tests.trainers import losses_of, trainer_of

ARGS = {
    "lora_rank": 4, "lora_alpha": 8, "lora_dropout": 0.0, "use_rslora": False, "use_dora": False,
    "target_modules": ["q_proj", "v_proj"], "target_parameters": None, "modules_to_save": [],
    "task_type": "causal_lm", "tuner_type": "lora_ga", "callbacks": ["gradinit"],
}  # fmt: skip


@pytest.fixture
def tables(monkeypatch):
    from swift.callbacks import callbacks_map
    from swift.tuner_plugin import tuners_map

    from peft_gradinit.integrations.swift import register

    tuners, callbacks = dict(tuners_map), dict(callbacks_map)
    register(learning_rate="suggested", max_tokens=64, stable_gamma=32)
    yield tuners_map, callbacks_map
    for table, before in ((tuners_map, tuners), (callbacks_map, callbacks)):
        table.clear()
        table.update(before)


def swift_trainer(model, folder, callbacks_map, names):
    """A trainer that makes its callbacks before it is complete, as swift's does."""

    class SwiftTrainer(Trainer):
        def __init__(self, model, args, **options):
            made = [callbacks_map[name](args, self) for name in names]
            super().__init__(model, args, callbacks=made, **options)

    like = trainer_of(model, folder)
    like.args.max_epochs = None  # an argument of swift's own, which its patched Trainer reads
    options = {"train_dataset": like.train_dataset, "data_collator": like.data_collator}
    return SwiftTrainer(model, like.args, **options)


def test_a_run_starts_from_the_trainers_data_and_is_continued(tables, tmp_path):
    tuners, callbacks = tables
    tuner = tuners["lora_ga"]
    model = tuner.prepare_model(SimpleNamespace(**ARGS), pico_llama())
    config = model.peft_config["default"]
    assert (config.r, config.stable_gamma, config.task_type) == (4, 32, "CAUSAL_LM")
    trainer = swift_trainer(model, tmp_path, callbacks, ARGS["callbacks"])
    trainer.train()
    report = init_report(model)
    assert report.facts.n_tokens >= 64
    assert trainer.args.learning_rate == report.learning_rate.suggested
    losses = losses_of(trainer)
    assert losses[-1] < losses[0]

    tuner.save_pretrained(model, str(tmp_path / "saved"))
    continued = tuner.from_pretrained(pico_llama(), str(tmp_path / "saved"), is_trainable=True)
    assert continued.peft_config["default"].peft_type.value == "LORA_GA"
    plain = tuner.from_pretrained(pico_llama(), str(tmp_path / "saved"))
    assert type(plain.base_model) is LoraModel
    assert (logits(continued) - logits(model)).abs().max() < 1e-5
    assert (logits(plain) - logits(model)).abs().max() < 1e-5


@pytest.mark.parametrize("kind", METHODS, ids=lambda kind: kind.name)
def test_every_method_is_a_tuner(tables, kind):
    from swift.tuner_plugin import PeftTuner

    from peft_gradinit.integrations.swift import register

    register()
    tuner = tables[0][kind.name]
    assert issubclass(tuner, PeftTuner)
    model = tuner.prepare_model(SimpleNamespace(**ARGS), pico_llama())
    assert type(model.peft_config["default"]) is kind


def test_nothing_is_added_where_nothing_waits(tables, tmp_path):
    from peft_gradinit.integrations.swift import register

    register()
    model = tables[0]["pissa"].prepare_model(SimpleNamespace(**ARGS), pico_llama())
    trainer = swift_trainer(model, tmp_path, tables[1], ARGS["callbacks"])
    names = [type(callback).__name__ for callback in trainer.callback_handler.callbacks]
    assert "GradInitCallback" in names
    assert "CalibrationCallback" not in names
