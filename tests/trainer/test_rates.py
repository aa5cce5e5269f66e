"""The learning rate that the callback sets, checks and logs."""

import math
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback

from peft_gradinit import (
    CalibrationCallback,
    LoraOneConfig,
    SVFitConfig,
    init_report,
    suggest_learning_rate,
)
from peft_gradinit.errors import ConfigError
from peft_gradinit.optim import optimizer
from peft_gradinit.trainer.optimizers import MadeAt, is_like_adam, rescale_rates
from tests.helpers import adapted, pico_llama, quiet, token_batches
from tests.trainer.runs import ROWS, trainer_of
from tests.trainer.trl_runs import config_of as trl_config_of
from tests.trainer.trl_runs import trainer_of as trl_trainer_of

OPTIONS = {"r": 4, "lora_alpha": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def lora_one(calibration="deferred", **options):
    config = LoraOneConfig(**{**OPTIONS, **options}, calibration=calibration)
    return get_peft_model(pico_llama(), config)


MODELS = {
    "deferred": lambda: lora_one(),
    "deferred-auto": lambda: lora_one(target_modules="auto"),
    "started": lambda: lora_one(quiet(token_batches())),
    "lora": lambda: get_peft_model(pico_llama(), LoraConfig(**OPTIONS)),
    "svfit": lambda: get_peft_model(pico_llama(), SVFitConfig(r=4, target_modules="all-linear")),
}


class Rates(TrainerCallback):
    """Writes down the rates of the optimiser's groups at every step."""

    def __init__(self):
        self.rates = []

    def on_step_begin(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append([group["lr"] for group in optimizer.param_groups])


def run(trainer, resume=None, **options):
    rates = Rates()
    trainer.add_callback(CalibrationCallback(trainer, **options))
    trainer.add_callback(rates)
    trainer.train(resume_from_checkpoint=resume)
    return rates.rates


@pytest.mark.parametrize("kind", MODELS)
def test_the_suggested_rate_is_trained_at(kind, tmp_path):
    trainer = trainer_of(tmp_path, model=MODELS[kind](), cls=Trainer, learning_rate=5e-5)
    rates = run(trainer, learning_rate="suggested")
    report = init_report(trainer.model)
    want = (report.learning_rate if report else suggest_learning_rate(trainer.model)).suggested
    assert all(rate == pytest.approx(want) for rate in rates[0])
    assert rates[1][0] == pytest.approx(0.8 * want)  # the schedule acts on it
    assert trainer.args.learning_rate == want


def test_a_schedule_that_waits_for_a_plateau_begins_at_the_suggested_rate(tmp_path):
    trainer = trainer_of(tmp_path, model=lora_one(), cls=Trainer, learning_rate=5e-5)
    trainer.args.lr_scheduler_type, trainer.eval_dataset = "reduce_lr_on_plateau", ROWS
    trainer.args.eval_strategy, trainer.args.eval_steps = "steps", 1
    trainer.args.metric_for_best_model = "loss"
    rates = run(trainer, learning_rate="suggested")
    want = init_report(trainer.model).learning_rate.suggested
    assert rates[0] == pytest.approx([want] * len(rates[0]))
    rescale_rates(trainer, want / 2, MadeAt(want, rates[0]))
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(want / 2)


def test_trl_trains_at_the_suggested_rate(tmp_path):
    trainer = trl_trainer_of("sft", tmp_path, peft_config=trl_config_of("LoRA-One"))
    rates = run(trainer, learning_rate="suggested")
    assert rates[0][0] == init_report(trainer.model).learning_rate.suggested


def test_rates_of_other_losses_are_not_suggested(tmp_path):
    trainer = trl_trainer_of("dpo", tmp_path, peft_config=trl_config_of("LoRA-One"))
    with pytest.raises(ConfigError, match=r"for supervised training; preference .*DPOTrainer"):
        CalibrationCallback(trainer, learning_rate="suggested")


@pytest.mark.parametrize("only_model", [False, True])
def test_a_resumed_run_goes_on_at_its_rate(only_model, tmp_path):
    options = {"cls": Trainer, "save_strategy": "steps", "save_steps": 2, "learning_rate": 5e-5}
    options["save_only_model"] = only_model
    trainer = trainer_of(tmp_path, model=lora_one(target_modules="auto"), **options)
    whole = run(trainer, learning_rate="suggested")
    resumed = trainer_of(tmp_path / "resumed", model=lora_one(target_modules="auto"), **options)
    rates = run(resumed, str(tmp_path / "checkpoint-2"), learning_rate="suggested")
    if only_model:  # Transformers begins the schedule anew
        assert rates[0] == pytest.approx(whole[0])
    else:
        assert rates == [pytest.approx(step) for step in whole[2:]]


def head_model():
    config = LoraOneConfig(**OPTIONS, modules_to_save=["lm_head"], calibration="deferred")
    return get_peft_model(pico_llama(), config)


@pytest.mark.parametrize("options", [{}, {"learning_rate": "suggested"}])
def test_heads_get_a_rate_of_their_own(options, tmp_path):
    model = head_model()
    rate = 7.5e-3
    trainer = trainer_of(tmp_path, model=model, cls=Trainer, learning_rate=rate)
    run(trainer, head_learning_rate=1e-3, **options)
    heads = {id(p) for p in model.get_base_model().lm_head.parameters() if p.requires_grad}
    groups = trainer.optimizer.param_groups
    rates = {g["initial_lr"] for g in groups for p in g["params"] if id(p) in heads}
    assert rates == {1e-3}
    want = init_report(model).learning_rate.suggested if options else rate
    assert {g["initial_lr"] for g in groups for p in g["params"] if id(p) not in heads} == {want}
    n_trained = sum(1 for p in model.parameters() if p.requires_grad)
    assert sum(len(g["params"]) for g in groups) == n_trained


def test_a_rate_for_heads_that_are_not_there_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, model=lora_one(), cls=Trainer)
    with pytest.raises(ConfigError, match=r"head_learning_rate=0.001 is for modules .* has none"):
        run(trainer, head_learning_rate=1e-3)


def test_options_that_cannot_work_are_refused_at_once(tmp_path):
    trainer = trainer_of(tmp_path, model=lora_one(), cls=Trainer)
    with pytest.raises(ConfigError, match=r"learning_rate must be 'suggested' or None, got 0\.1"):
        CalibrationCallback(trainer, learning_rate=0.1)
    with pytest.raises(
        ConfigError, match="head_learning_rate must be a positive number or 'suggested', got 0"
    ):
        CalibrationCallback(trainer, head_learning_rate=0)
    trainer.optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(ConfigError, match="the trainer was given an optimiser"):
        CalibrationCallback(trainer, learning_rate="suggested")


@pytest.mark.parametrize("optim", ["sgd", "apollo_adamw", "schedule_free_adamw"])
def test_rates_of_other_optimisers_are_not_suggested(optim, tmp_path):
    trainer = trainer_of(tmp_path, model=lora_one(), cls=Trainer)
    trainer.args.optim = optim  # the packages of the last two need not be there
    with pytest.raises(ConfigError, match=f"for Adam and its kin, but the trainer makes {optim}"):
        CalibrationCallback(trainer, learning_rate="suggested")
    arguments, rows = trainer_of(tmp_path, cls=Trainer).args, trainer.train_dataset
    chosen = optimizer("lora_muon", lr=0.03)
    trainer = Trainer(lora_one(), arguments, train_dataset=rows, optimizer_cls_and_kwargs=chosen)
    with pytest.raises(ConfigError, match="but the trainer makes lora_muon"):
        CalibrationCallback(trainer, learning_rate="suggested")
    CalibrationCallback(trainer)


@pytest.mark.parametrize(
    ("name", "is_like"),
    [
        ("adamw_torch_fused", True),
        ("paged_adamw_8bit", True),
        ("DeepSpeedCPUAdam", True),
        ("adalomo", False),
        ("ademamix", False),
        ("galore_adamw_8bit_layerwise", False),
        ("schedule_free_radam", False),
        ("AdamWScheduleFree", False),
    ],
)
def test_which_optimisers_take_rates_of_adam(name, is_like):
    assert is_like_adam(name) == is_like


def test_deepspeed_has_its_rate_before(tmp_path):
    trainer = trainer_of(tmp_path, model=lora_one(), cls=Trainer)
    trainer.is_deepspeed_enabled = True
    with pytest.raises(ConfigError, match="DeepSpeed takes the learning rate before"):
        CalibrationCallback(trainer, learning_rate="suggested")


def test_a_rate_far_from_the_suggested_one_is_said_once(tmp_path):
    trainer = trainer_of(tmp_path, model=lora_one(), cls=Trainer, learning_rate=5e-5)
    with pytest.warns(UserWarning, match=r"5.0e-05 is far from .*learning_rate='suggested'"):
        run(trainer)
    trainer.train()  # warnings are errors here
    for options in ({"optim": "sgd"}, {"learning_rate": 5e-3}):
        run(trainer_of(tmp_path, model=lora_one(), cls=Trainer, **options))


def test_rates_are_rescaled_with_their_ratios_and_the_schedule(tmp_path):
    trainer = trainer_of(tmp_path, model=lora_one(), cls=Trainer, learning_rate=1e-2)
    run(trainer)
    trainer.optimizer.param_groups[0]["initial_lr"] = 4e-2
    rescale_rates(trainer, 1e-3, MadeAt(1e-2, [4e-2, 1e-2]))
    assert [g["initial_lr"] for g in trainer.optimizer.param_groups] == pytest.approx([4e-3, 1e-3])
    assert trainer.lr_scheduler.base_lrs == pytest.approx([1e-3, 1e-3])


def test_rates_of_heads_and_of_checkpoints_stay(tmp_path):
    trainer = trainer_of(tmp_path, model=lora_one(), cls=Trainer, learning_rate=1e-2)
    run(trainer)
    for made_at in (MadeAt(1e-2, [1e-2, 1e-2], n_own=2), MadeAt(2e-2, [2e-2, 2e-2])):
        rescale_rates(trainer, 1e-3, made_at)
        assert [g["initial_lr"] for g in trainer.optimizer.param_groups] == [1e-2, 1e-2]
        assert trainer.lr_scheduler.base_lrs == [1e-2, 1e-2]


class FirstGroupOfItsOwn(Trainer):
    """Its optimiser has a rate of its own for the first factor."""

    def create_optimizer(self, model=None):
        first, *rest = [p for p in self.model.parameters() if p.requires_grad]
        groups = [{"params": [first], "lr": 1e-3}, {"params": rest}]
        self.optimizer = torch.optim.AdamW(groups, lr=self.args.learning_rate)
        return self.optimizer


def test_the_suggested_rate_replaces_that_of_the_arguments_and_no_other(tmp_path):
    trainer = trainer_of(tmp_path, model=lora_one(), cls=FirstGroupOfItsOwn, learning_rate=5e-5)
    rates = run(trainer, learning_rate="suggested")
    assert rates[0] == pytest.approx([1e-3, init_report(trainer.model).learning_rate.suggested])


def test_an_optimiser_that_was_given_later_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, model=lora_one(), cls=Trainer)
    callback = CalibrationCallback(trainer, learning_rate="suggested")
    trainer.add_callback(callback)
    trained = [p for p in trainer.model.parameters() if p.requires_grad]
    trainer.optimizer = torch.optim.AdamW(trained, lr=1e-3)
    with pytest.raises(ConfigError, match="was given an optimiser, which has its learning rate"):
        trainer.train()


# Logs --------------------------------------------------------------------------------------------


class Logged(TrainerCallback):
    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_the_start_is_logged(tmp_path):
    trainer = trainer_of(tmp_path, model=lora_one(), cls=Trainer, learning_rate=7e-3)
    logged = Logged()
    trainer.add_callback(logged)
    run(trainer)
    report = init_report(trainer.model)
    first = logged.logs[0]
    assert first["calibration/loss"] == report.facts.loss
    assert first["calibration/loss_after_step"] == report.step.loss_after
    assert first["calibration/seconds"] > 0
    assert 0 < first["calibration/energy"] <= 1
    assert first["calibration/learning_rate"] == report.learning_rate.suggested
    assert all(isinstance(v, float | int) for v in first.values())
    assert trainer.state.log_history[0]["calibration/ranks"] == report.ranks()
    assert sum("calibration/loss" in log for log in logged.logs) == 1


def test_logs_can_be_switched_off(tmp_path):
    trainer = trainer_of(tmp_path, model=lora_one(), cls=Trainer, learning_rate=7e-3)
    logged = Logged()
    trainer.add_callback(logged)
    run(trainer, log=False)
    assert not any("calibration" in key for log in logged.logs for key in log)
    assert trainer.state.log_history[0]["calibration/ranks"] == init_report(trainer.model).ranks()


class TensorBoardCallback(TrainerCallback):
    """Stands for Transformers' own."""

    def __init__(self):
        self.texts, self.tb_writer = {}, self

    def add_text(self, name, text):
        self.texts[name] = text


class WandbCallback(TrainerCallback):
    """Stands for Transformers' own."""

    def __init__(self):
        self.logged, self.run, self._wandb = {}, object(), self

    def log(self, values):
        self.logged |= values

    def Table(self, columns, data):
        return columns, data


def test_ranks_are_a_table_where_there_are_tables(tmp_path):
    trainer = trainer_of(tmp_path, model=adapted(pico_llama()), cls=Trainer, learning_rate=4e-3)
    board, runs = TensorBoardCallback(), WandbCallback()
    trainer.add_callback(board)
    trainer.add_callback(runs)
    with pytest.warns(UserWarning, match="every adapter has its start already"):
        run(trainer)
    text = board.texts["calibration/ranks"]
    assert "| model.layers.0.self_attn.q_proj | 4 |" in text.splitlines()
    columns, rows = runs.logged["calibration/ranks"]
    assert columns == ["module", "rank"]
    assert dict(rows) == init_report(trainer.model).ranks()
    assert not math.isnan(trainer.state.log_history[0]["calibration/loss"])


OWN_RATES = {"given": {"lr": 1e-4}, "default": {}}


@pytest.mark.parametrize("kind", ["deferred", "lora"])
@pytest.mark.parametrize("own", OWN_RATES)
def test_an_optimiser_with_a_rate_of_its_own_gets_no_suggested_one(own, kind, tmp_path):
    made = trainer_of(tmp_path, cls=Trainer)
    chosen = (torch.optim.AdamW, OWN_RATES[own])
    trainer = Trainer(
        MODELS[kind](),
        made.args,
        data_collator=made.data_collator,
        train_dataset=ROWS,
        optimizer_cls_and_kwargs=chosen,
    )
    with pytest.raises(ConfigError, match=r"its optimiser has one of its own \((0\.0001|0\.001)\)"):
        run(trainer, learning_rate="suggested")


def test_the_rate_that_is_compared_is_that_of_the_optimiser(tmp_path):
    made = trainer_of(tmp_path, cls=Trainer)
    made.args.learning_rate = 5e-5  # which an optimiser with a rate of its own does not take
    rate = suggest_learning_rate(lora_one(quiet(token_batches()))).suggested
    for lr, told in ((rate, False), (rate / 100, True)):
        trainer = Trainer(
            lora_one(),
            made.args,
            data_collator=made.data_collator,
            train_dataset=ROWS,
            optimizer_cls_and_kwargs=(torch.optim.AdamW, {"lr": lr}),
        )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            run(trainer)
        assert any("is far from the one suggested" in str(w.message) for w in caught) == told


def test_the_value_of_dft_does_not_decide_over_a_step(tmp_path):
    trainer = trainer_of(tmp_path, model=lora_one(), cls=Trainer)
    trainer.args.loss_type = "dft"
    with pytest.warns(
        UserWarning, match="is not checked: the value of the loss 'dft' does not tell"
    ):
        run(trainer)
