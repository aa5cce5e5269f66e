"""What is asked of the command line or the library loads nothing that it does not need."""

import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest

from peft_gradinit.analysis import THRESHOLD, TOP
from peft_gradinit.methods import METHODS
from peft_gradinit_cli.commands import compare
from peft_gradinit_cli.commands.methods import CALIBRATED

ROOT = Path(__file__).parents[2]
COMMANDS = ("calibrate", "start", "inspect", "compare", "convert", "export", "train", "doctor")


def python(*arguments):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, check=False, cwd=ROOT
    )


@pytest.mark.parametrize(
    "line", [(), ("--help",), ("--version",), *((c, "--help") for c in COMMANDS)], ids=" ".join
)
def test_help_and_version_load_no_library_of_models(line):
    done = python("-X", "importtime", "-m", "peft_gradinit_cli", *line)
    assert "Usage: " in done.stdout or done.stdout.startswith("peft-gradinit ")
    assert done.returncode == (0 if line else 2)
    loaded = {entry.rpartition("|")[2].strip() for entry in done.stderr.splitlines()}
    assert "typer" in loaded
    assert not {"torch", "transformers", "peft", "peft_gradinit", "datasets", "numpy"} & loaded


def test_the_library_loads_nothing_of_the_command_line():
    # PEFT is there first: its older versions load some of them.
    code = "import sys, peft; hosts = {*sys.modules}; import peft_gradinit"
    done = python("-c", f"{code}; print(*{{*sys.modules}} - hosts)")
    loaded = set(done.stdout.split())
    assert "peft_gradinit.trainer" in loaded
    heavy = {"datasets", "pandas", "pyarrow", "multiprocess", "rich", "typer", "pydantic"}
    assert not heavy & loaded


def without(package, code):
    return python("-c", f"import sys; sys.modules[{package!r}] = None; {code}")


def test_without_typer_the_command_line_says_what_to_install():
    done = without("typer", "import peft_gradinit_cli as cli; cli.main()")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == (
        "error: the command line needs typer, which is not installed; "
        "pip install 'peft_gradinit[cli]'\n"
    )


@pytest.mark.slow
def test_without_pydantic_commands_and_recipes_say_what_to_install():
    command = "sys.argv[1:] = ['calibrate', 'embedded:pico-llama', 'embedded:docstrings', 'out/c']"
    done = without("pydantic", f"import peft_gradinit_cli as cli; {command}; cli.main()")
    assert (done.returncode, done.stdout) == (1, "")
    assert "error: the command line needs pydantic" in done.stderr
    assert "Traceback" not in done.stderr
    done = without("pydantic", "import peft_gradinit; import peft_gradinit.recipes")
    reason = "recipes need pydantic, which is not installed; pip install 'peft_gradinit[cli]'"
    assert done.stderr.splitlines()[-1] == f"ModuleNotFoundError: {reason}"


TRAIN = """
import sys
for name in ("datasets", "evaluate", "pydantic", "sklearn", "trl", "typer"):
    sys.modules[name] = None
import torch
from peft import get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from peft_gradinit import LoraGAConfig, load_for_training
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
config = LlamaConfig(vocab_size=64, num_hidden_layers=1, **sizes)
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(config)
ids = torch.randint(64, (8, 16))
batches = [{"input_ids": ids, "labels": ids}]
start = LoraGAConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM", calibration=batches)
peft_model = get_peft_model(model(), start)
peft_model(**batches[0]).loss.backward()
peft_model.save_pretrained(sys.argv[1])
load_for_training(model(), sys.argv[1])
"""


@pytest.mark.slow
def test_the_library_works_without_the_extra(tmp_path):
    done = python("-c", TRAIN, str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter_model.safetensors").exists()


def test_what_the_help_repeats_is_true():
    assert {
        m.name: f"{m.start} (needs {m.needed()})" for m in METHODS if m.needed() != "nothing"
    } == CALIBRATED
    defaults = {p.name: p.default for p in signature(compare).parameters.values()}
    assert (defaults["top"], defaults["threshold"]) == (TOP, THRESHOLD)
