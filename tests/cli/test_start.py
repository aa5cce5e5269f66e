"""`peft-gradinit start`: a plain adapter that other frameworks continue from, in the same run."""

import ast
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file

from peft_gradinit import METHODS, GradInitConfig
from peft_gradinit.recipes import ModelSection, load_model
from peft_gradinit_cli.commands.measured import Measured
from peft_gradinit_cli.commands.methods import PLAIN
from peft_gradinit_cli.work.arguments import job_of
from peft_gradinit_cli.work.start import CONTINUED
from tests.helpers import logits, pico_llama, token_batches, train_steps

ROOT = Path(__file__).parents[2]
MODEL, DATA = "embedded:pico-llama", "embedded:docstrings"
SIZES = {"r": 4, "max_length": 48, "max_tokens": 1024}
OPTIONS = [f"--{name.replace('_', '-')}={value}" for name, value in SIZES.items()]


def trained(model):
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def fresh():
    return load_model(ModelSection(name=MODEL))


def test_methods_are_those_that_fix_nothing():
    plain = [m.name for m in METHODS if issubclass(m, GradInitConfig) and not m.anchored]
    assert sorted(plain) == sorted(PLAIN)


ALLOCATED = ["rank_allocation=gradient_energy", "rho=4", "min_rank=0", "lora_dropout=0.1"]


@pytest.mark.parametrize(
    ("method", "more"), [("lora_one", []), ("lora_one", ALLOCATED), ("eva", []), ("eva", ["rho=1"])]
)
def test_plain_peft_continues_the_same_run(method, more, run, tmp_path):
    options = [word for option in more for word in ("--option", option)]
    done = run("start", MODEL, DATA, tmp_path / "start", "--method", method, *OPTIONS, *options)
    assert done.code == 0, done.err
    job = job_of(**Measured(**SIZES, option=more).sections(MODEL, DATA, method))
    live = job.start(torch.device("cpu"), progress=False)
    plain = PeftModel.from_pretrained(fresh(), tmp_path / "start", is_trainable=True)
    assert plain.peft_config["default"].peft_type.value == "LORA"
    assert live.peft_config["default"].peft_type.value == method.upper()
    start = logits(plain)
    assert torch.equal(logits(live), start)
    losses = []
    for model in (live, plain):
        torch.manual_seed(0)
        losses.append(train_steps(model.train(), 3))
    assert losses[0] == losses[1]
    assert (logits(plain) - start).abs().max() > 1e-3
    one, two = trained(live), trained(plain)
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


@pytest.mark.parametrize(
    ("method", "fixed"),
    [(m.name, m.anchored) for m in METHODS if m.name not in PLAIN],
)
def test_other_methods_would_be_another_run_and_are_refused(method, fixed, run, tmp_path):
    done = run("start", MODEL, DATA, tmp_path / "start", "--method", method, *OPTIONS)
    assert done.code == 1
    assert "would train something else. Use one of ['lora_one', 'eva'], or" in done.err
    assert not (tmp_path / "start").exists()

    kind = next(m for m in METHODS if m.name == method)
    more = {} if kind.needed() == "nothing" else {"calibration": token_batches()}
    config = kind(r=2, target_modules=["q_proj", "v_proj"], **more)
    live = get_peft_model(pico_llama(), config)
    live.save_pretrained(tmp_path / "saved")
    plain = PeftModel.from_pretrained(pico_llama(), tmp_path / "saved", is_trainable=True)
    assert torch.allclose(logits(live), logits(plain), atol=1e-4)
    more_numbers = sum(map(torch.numel, trained(plain).values()))
    numbers = sum(map(torch.numel, trained(live).values()))
    assert more_numbers == 2 * numbers if fixed else more_numbers > 10 * numbers
    for model in (live, plain):
        train_steps(model, 3)
    assert not torch.allclose(logits(live), logits(plain), atol=1e-3)


@pytest.mark.parametrize("name", ["start", "a start: é #1 'x'"])
def test_lines_can_be_pasted(name, run, tmp_path):
    folder = tmp_path / name
    done = run("start", MODEL, DATA, folder, *OPTIONS, "--lora-alpha", 8, "--use-rslora")
    assert done.code == 0, done.err
    config = PeftModel.from_pretrained(fresh(), folder).peft_config["default"]
    assert (config.r, config.lora_alpha, config.use_rslora) == (4, 8, True)
    blocks = dict(block.split("\n", 1) for block in done.out.strip().split("\n\n")[2:])
    blocks = {re.sub(r"\x1b\[\d*m", "", name): lines for name, lines in blocks.items()}
    assert blocks.keys() == CONTINUED.keys()
    for name, key in (("LLaMA-Factory", "adapter_name_or_path"), ("axolotl", "lora_model_dir")):
        values = yaml.safe_load(blocks[name])
        assert values[key] == str(folder)
        assert isinstance(values["learning_rate"], float)
    for name in ("PEFT", "unsloth"):
        parsed = ast.walk(ast.parse(blocks[name]))
        assert str(folder) in [node.value for node in parsed if isinstance(node, ast.Constant)]
    assert shlex.split(blocks["ms-swift"])[:2] == ["--adapters", str(folder)]
    json = run("start", MODEL, DATA, folder, *OPTIONS, "--overwrite", "--json").json
    assert json["method"] == "LoRA-One"
    assert set(json["ranks"].values()) == {4}
    assert 0 < json["learning_rate"] < 1
    assert f"{json['learning_rate']:.1e}" != blocks["ms-swift"].split()[-1]  # alpha differs


def test_what_is_there_is_told_before_the_work(run, tmp_path):
    (tmp_path / "start").mkdir()
    (tmp_path / "start" / "notes.txt").write_text("mine")
    for more in ((), ("--overwrite",)):
        done = run("start", MODEL, "missing.jsonl", tmp_path / "start", *more)
        assert done.code == 1
        assert "notes.txt" in done.err
    assert run("start", MODEL, DATA).code == 2


@pytest.mark.slow
def test_two_processes_give_the_start_of_one(run, tmp_path):
    assert run("start", MODEL, DATA, tmp_path / "one", *OPTIONS).code == 0
    # `accelerate launch --cpu` starts one process where there is no MPI.
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "--")
    command = ("peft_gradinit_cli", "start", MODEL, DATA, str(tmp_path / "two"), *OPTIONS, "--json")
    done = subprocess.run(
        [sys.executable, *launch, *command], capture_output=True, text=True, check=False, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('"learning_rate"') == 1  # one process speaks for both
    one, two = (load_file(tmp_path / n / "adapter_model.safetensors") for n in ("one", "two"))
    for name in (key.replace("lora_A", "lora_B") for key in one if "lora_A" in key):
        first, second = (f[name] @ f[name.replace("lora_B", "lora_A")] for f in (one, two))
        assert torch.linalg.norm(first - second) < 1e-3 * torch.linalg.norm(first), name
