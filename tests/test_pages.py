"""The Python of the documentation runs as printed, on small models."""

import ast
import re
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaForSequenceClassification, Trainer, TrainingArguments

from peft_gradinit import CalibrationResult, LoraGAConfig, init_report, pairs, suggest_learning_rate
from peft_gradinit.optim import LoraMuon
from tests.helpers import adapted, pico_llama, token_batches
from tests.moe.models import qwen3_moe
from tests.trainer.trl_runs import texts, tokenizer

ROOT = Path(__file__).parent.parent


def blocks(page):
    """The Python of a page, in order."""
    return re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)


@pytest.mark.parametrize("page", ["README.md", "docs/explanations/ranks.md"])
def test_first_examples_run_as_printed(page, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    made = []

    class Kept(Trainer):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            made.append(self)

    rows = [{name: values[0] for name, values in batch.items()} for batch in token_batches(2)]
    args = TrainingArguments("run", use_cpu=True, report_to=[], max_steps=1, save_strategy="no")
    names = {"Trainer": Kept, "args": args, "data": rows}
    names |= {"model": pico_llama(), "train_dataloader": token_batches()}
    exec(blocks(page)[0], names)
    printed = capsys.readouterr().out
    assert f"LoRA-One: {15 if page == 'README.md' else 14} modules" in printed
    assert "learning rate" in printed
    if page == "README.md":
        assert args.learning_rate == suggest_learning_rate(names["model"]).suggested
        assert made[0].state.global_step == 1
        assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    else:
        assert len(set(init_report(names["model"]).ranks().values())) > 1


def test_example_of_an_output_layer_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"model": pico_llama()}
    exec(blocks("docs/choosing.md")[0], names)
    assert names["rate"] > 0
    loaded = PeftModel.from_pretrained(pico_llama(), tmp_path / "out")
    assert "lm_head" in loaded.peft_config["default"].target_modules


def test_example_of_our_start_with_lora_muon_runs_as_printed(tmp_path):
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=1)
    names = {"Trainer": Trainer, "args": args, "data": [], "model": pico_llama()}
    exec(blocks("docs/choosing.md")[1], names | {"train_dataloader": token_batches()}, names)
    assert "lm_head" in init_report(names["model"]).ranks()
    assert isinstance(names["trainer"].create_optimizer(), LoraMuon)


def test_example_of_our_start_on_encoders_runs_as_printed(tmp_path):
    of_model = pico_llama(num_labels=3, pad_token_id=0).config
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=1)
    ids = torch.randint(1, of_model.vocab_size, (32, 12))
    rows = [{"input_ids": row, "labels": torch.tensor(k % 3)} for k, row in enumerate(ids)]
    batches = [{n: torch.stack([row[n] for row in rows]) for n in rows[0]}]
    names = {"Trainer": Trainer, "args": args, "data": rows, "train_dataloader": batches}
    names["model"] = LlamaForSequenceClassification(of_model)
    exec(blocks("docs/choosing.md")[2], names)
    assert len(set(init_report(names["model"]).ranks().values())) > 1
    names["trainer"].train()
    pairs_, head = names["trainer"].optimizer.param_groups[:2]
    assert (pairs_["initial_lr"], pairs_["momentum"], head["initial_lr"]) == (0.03, 0.8, 3e-2)


def test_example_of_a_rate_for_a_new_head_runs_as_printed(tmp_path):
    config = LoraConfig(
        r=2, target_modules=["q_proj"], task_type="SEQ_CLS", modules_to_save=["score"]
    )
    of_model = pico_llama(num_labels=3, pad_token_id=0).config
    model = get_peft_model(LlamaForSequenceClassification(of_model), config)
    args = TrainingArguments(str(tmp_path), use_cpu=True, report_to=[], max_steps=1)
    rows = [{"input_ids": torch.arange(1, 6), "labels": torch.tensor(k)} for k in range(3)]
    names = {"Trainer": Trainer, "args": args, "data": rows, "model": model}
    exec(blocks("docs/choosing.md")[3], names)
    names["trainer"].train()
    rates = [group["initial_lr"] for group in names["trainer"].optimizer.param_groups]
    low, high = sorted({*rates})
    assert low == suggest_learning_rate(model).suggested < high


def test_the_first_page_has_the_example_of_the_readme():
    assert blocks("docs/index.md") == blocks("README.md")


@pytest.mark.filterwarnings("ignore:LoRA-GA needs 32 singular directions")  # a pico model
def test_example_for_trl_runs_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("docs/guides/trainer.md")[0]
    code = code.replace('SFTConfig("out")', 'SFTConfig("out", use_cpu=True)')
    pico_llama().save_pretrained("base")
    tokenizer().save_pretrained("base")
    names = {"model": "base", "train_dataset": texts()}
    exec(code, names)
    assert names["trainer"].state.global_step > 0
    assert names["trainer"].model.base_model.init_report["default"].facts.n_tokens > 100


def test_examples_of_a_loop_run_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names = {"model": pico_llama(), "train_dataloader": token_batches()}
    for code in blocks("docs/guides/loop.md"):
        exec(code, names)
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()
    assert len(capsys.readouterr().out.splitlines()) == 14


def test_example_of_a_calibration_runs_as_printed():
    names = {"data": token_batches()}
    code = blocks("docs/guides/calibration.md")[0]
    exec(code.replace("\nCalibration(\n", "\nspec = Calibration(\n"), names)
    assert (names["spec"].max_tokens, names["spec"].token_budget) == (None, 65_536)


def test_example_of_a_learning_rate_runs_as_printed():
    names = {"model": adapted(pico_llama()), "TrainingArguments": TrainingArguments}
    exec(blocks("docs/explanations/learning-rate.md")[0], names)
    rate, args = names["rate"], names["args"]
    assert rate.low < args.learning_rate == rate.suggested < rate.high


def test_examples_of_an_optimiser_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"model": adapted(pico_llama()), "Trainer": Trainer, "data": texts()}
    names["args"] = TrainingArguments("out", use_cpu=True)
    for code in blocks("docs/optimisers.md"):
        exec(code, names)
    assert names["optimiser"].param_groups[0]["lr"] == 0.03
    assert isinstance(names["trainer"].create_optimizer(), type(names["optimiser"]))


def test_example_of_a_saved_and_a_deferred_calibration_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code = blocks("docs/guides/calibration.md")[1]
    code = code.replace("LoraGAConfig(...,", 'LoraGAConfig(target_modules="all-linear", r=2,')
    config = LoraGAConfig(target_modules="all-linear", r=2, calibration="deferred")
    names = {"config": config, "data": token_batches(), "get_peft_model": get_peft_model}
    exec(code, names | {"model": pico_llama()})
    assert CalibrationResult.load("calibration").facts.n_tokens > 100


def test_example_of_experts_runs_as_printed():
    names = {"LoraGAConfig": LoraGAConfig, "train_dataloader": token_batches()}
    exec(blocks("docs/guides/experts.md")[0], names)
    names["config"].r = 2
    model = get_peft_model(qwen3_moe(), names["config"])
    assert {pair.n_experts for pair in pairs(model)} > {1}


def test_examples_of_loading_run_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    adapted(pico_llama()).save_pretrained("out")
    (code,) = blocks("docs/guides/resuming.md")
    code = code.replace('"me/adapter", revision="main"', '"out"')  # a Hub is not here
    names = {"PeftModel": PeftModel}
    for line in ast.parse(code).body:
        names["base_model"] = pico_llama()
        exec(ast.unparse(line), names)


@pytest.mark.filterwarnings("ignore:.*MatMul8bitLt.*")
def test_example_of_a_quantised_base_runs_as_printed(tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.chdir(tmp_path)
    pico_llama(hidden_size=64, intermediate_size=128).save_pretrained("base")
    names = {"name": "base", "train_dataloader": token_batches()}
    exec(blocks("docs/guides/quantised.md")[0], names)
    assert init_report(names["model"]).facts.n_tokens > 100
