"""Trainer, TRL and Accelerate train with the optimisers, and resume."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from peft import LoraConfig, get_peft_model

from peft_gradinit import CalibrationCallback, pairs
from peft_gradinit.optim import LoraMuon, optimizer
from tests.helpers import pad, pico_llama, rows_of, token_batches
from tests.methods.rows import started
from tests.optim.rows import ROWS, factors, loss_of, run, same, toy
from tests.trainers import losses_of, trainer_of


def lora(**options):
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", **options)
    return get_peft_model(pico_llama(), config)


def trainer(model, directory, row, **options):
    made = trainer_of(model, directory, **options)
    made.optimizer_cls_and_kwargs = optimizer(row.kind.name, lr=row.lr, **row.options)
    return made


@pytest.mark.parametrize("name", ["lora_muon", "lora_rite", "lora_one-gd", "lora_pro-full"])
def test_trainer_lowers_the_loss_and_resumes_bit_for_bit(name, tmp_path):
    row = ROWS[name]
    options = {
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 2,
        "max_grad_norm": 1.0,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
    }
    straight = trainer(lora(), tmp_path, row, **options)
    straight.train()
    assert type(straight.optimizer.optimizer) is row.kind
    losses = losses_of(straight)
    assert min(losses[3:]) < losses[0]
    logged = [log["learning_rate"] for log in straight.state.log_history if "loss" in log]
    assert max(logged) == pytest.approx(row.lr)
    assert logged[0] < max(logged)
    assert logged[-1] < max(logged)
    resumed = trainer(lora(), tmp_path, row, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert same(factors(straight.model), factors(resumed.model))


def test_the_argument_of_trainer_itself(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = lora(modules_to_save=["lm_head"])
    arguments = TrainingArguments(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, save_steps=100
    )
    made = Trainer(
        model,
        arguments,
        train_dataset=rows_of(token_batches()),
        data_collator=pad,
        optimizer_cls_and_kwargs=optimizer("lora_muon", lr=0.03, head_lr=1e-3),
    )
    before = factors(model)
    made.train()
    assert not same(before, factors(model))
    first, rest = made.optimizer.param_groups
    assert (first["initial_lr"], rest["initial_lr"]) == (0.03, 1e-3)
    assert first["lr"] == rest["lr"] == 0.0  # a linear schedule's end


def test_a_deferred_adapter_is_started_before_the_optimizer_is_made(tmp_path):
    model = started("lora_ga", calibration="deferred")
    made = trainer_of(model, tmp_path, max_steps=3)
    made.optimizer_cls_and_kwargs = optimizer("lora_muon", lr=0.03)
    made.add_callback(CalibrationCallback(made))
    made.train()
    held = {id(p) for p in made.optimizer.param_groups[0]["params"]}
    assert held == {id(f) for p in pairs(model) for f in (p.A, p.B)}
    assert all(p.B.any() for p in pairs(model))


def test_trl_passes_it_on(tmp_path):
    trl = pytest.importorskip("trl")
    from tests.trainer.trl_runs import texts, tokenizer

    arguments = trl.SFTConfig(
        str(tmp_path), max_steps=2, report_to=[], use_cpu=True, disable_tqdm=True, max_length=32
    )
    model = pico_llama()
    made = trl.SFTTrainer(
        model,
        arguments,
        train_dataset=texts(),
        processing_class=tokenizer(),
        peft_config=LoraConfig(r=4, target_modules="all-linear"),
        optimizer_cls_and_kwargs=optimizer("lora_muon", lr=0.03),
    )
    made.train()
    assert type(made.optimizer.optimizer) is LoraMuon
    assert all(p.B.any() for p in pairs(made.model))


@pytest.mark.parametrize("kind", ["sft", "dpo", "kto", "grpo"])
def test_trainers_of_trl_take_it_as_an_attribute(kind, tmp_path):
    pytest.importorskip("trl")
    from tests.trainer.trl_runs import trainer_of as trl_trainer

    config = LoraConfig(r=4, target_modules="all-linear")
    made = trl_trainer(kind, tmp_path, peft_config=config, learning_rate=0.0)
    made.optimizer_cls_and_kwargs = optimizer("lora_muon", lr=0.03)
    made.train()
    assert type(made.optimizer.optimizer) is LoraMuon
    assert any(p.B.any() for p in pairs(made.model))


def test_accelerate_accumulates_and_clips():
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, plain = toy(), toy()
    model, prepared = accelerator.prepare(model, LoraMuon(model, lr=0.03))
    for step in range(4):
        with accelerator.accumulate(model):
            accelerator.backward(loss_of(model, step))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 1e9)
            prepared.step()
            prepared.zero_grad()
    alone = LoraMuon(plain, lr=0.03)
    for step in (0, 2):
        for part in (step, step + 1):
            (loss_of(plain, part) / 2).backward()
        alone.step()
        alone.zero_grad()
    assert same(factors(model), factors(plain))


def test_clipping_before_a_first_step_of_lora_muon_changes_nothing_that_counts():
    """Its step does not depend on the gradient's size."""
    model, clipped = toy(), toy()
    run(model, LoraMuon(model, lr=0.03), 1)
    optimizer_ = LoraMuon(clipped, lr=0.03)
    loss_of(clipped, 0).backward()
    torch.nn.utils.clip_grad_norm_(clipped.parameters(), 1e-3)
    optimizer_.step()
    for a, b in zip(factors(model), factors(clipped), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
