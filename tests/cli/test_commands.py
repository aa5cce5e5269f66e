"""Every command does what it says, and prints what is stored of it."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from peft import PeftModel
from transformers import AutoTokenizer, LlamaConfig, LlamaForSequenceClassification
from typer.testing import CliRunner

import peft_gradinit
from peft_gradinit import (
    CalibrationResult,
    EvaConfig,
    LoraGAConfig,
    init_report,
    suggest_learning_rate,
)
from peft_gradinit.methods import METHODS
from peft_gradinit.recipes import ModelSection, load_model
from peft_gradinit.recipes.embedded import pico_tokenizer
from peft_gradinit_cli.app import app
from peft_gradinit_cli.commands.measured import Measured
from peft_gradinit_cli.work.arguments import job_of
from tests.cli.conftest import calibrate_arguments, check_snapshot, kinds
from tests.helpers import adapted, logits, pico_llama, quiet, relative_error, token_batches
from tests.saved.adapters import logits_on_fresh_base, saved_lora

COMMANDS = ("calibrate", "start", "inspect", "compare", "convert", "export", "doctor")


def pico_classifier():
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        pad_token_id=0,
    )
    return LlamaForSequenceClassification(config)


def plain(text):
    return re.sub(r"\x1b\[[0-9;]*m", "", text)


def test_help_names_every_command_and_method(run):
    done = run("--help")
    assert done.code == 0
    for command in COMMANDS:
        assert re.search(rf"^│ {command} ", plain(done.out), flags=re.MULTILINE)
    of_calibrate = " ".join(re.sub(r"[│\n ]+", " ", plain(run("calibrate", "--help").out)).split())
    for method in METHODS:
        if method.needed() != "nothing":
            assert f"{method.name}: {method.start} (needs {method.needed()})." in of_calibrate


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_is_explained(command):
    import typer

    for parameter in typer.main.get_command(app).commands[command].params:
        explained = getattr(parameter, "help", None)
        obvious = {"split", "r", "revision", "assistant_only_loss"}
        assert explained or parameter.name in obvious, parameter.name


def test_version_completion_and_wrong_lines(run, monkeypatch):
    monkeypatch.setattr("shellingham.detect_shell", lambda: ("bash", "/bin/bash"))
    assert run("--version").out.strip() == f"peft-gradinit {peft_gradinit.__version__}"
    completion = CliRunner().invoke(app, ["--show-completion"])
    assert "complete" in completion.output
    assert run("calibrat").code == 2
    assert run("calibrate", "--r", "none").code == 2
    assert run("inspect", "x", "--no-such-option").code == 2


def test_doctor(run, workshop, tmp_path):
    done = run("doctor")
    assert done.code == 0
    for name in (
        "peft_gradinit",
        "torch",
        "lora_ga, lora_one, eva, corda, pissa, milora, olora, svfit",
    ):
        assert name in done.out
    content = run("doctor", "--json").json
    assert content["calibration in float32"] is True
    check_snapshot("doctor.json", json.dumps(kinds(content), indent=1), workshop, tmp_path)


def test_doctor_fails_when_something_does_not_work(run, monkeypatch):
    import peft_gradinit_cli.work.doctor as module

    monkeypatch.setattr(module, "_calibrates", lambda dtype: False)
    done = run("doctor", "--json")
    assert done.code == 1
    assert done.json["calibration in float32"] is False


def test_calibrate(run, workshop, tmp_path):
    done = run(*calibrate_arguments(tmp_path / "c"))
    assert done.code == 0
    check_snapshot("calibrate", done.out, workshop, tmp_path)
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == [
        "calibration.json",
        "calibration.safetensors",
    ]
    record = json.loads((tmp_path / "c" / "calibration.json").read_text())
    assert record["method"]["name"] == "lora_ga"
    content = run(*calibrate_arguments(tmp_path / "d", "--json")).json
    check_snapshot("calibrate.json", json.dumps(kinds(content), indent=1), workshop, tmp_path)


def test_the_result_is_what_a_config_takes(calibration):
    config = LoraGAConfig(r=4, target_modules="all-linear", calibration=str(calibration))
    model = adapted(load_model(ModelSection(name="embedded:pico-llama")), config)
    assert len(model.base_model.init_report["default"].modules) == 21


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("--option", "rank_allocation=gradient_energy", "--option", "rho=4"),
        ("--method", "eva", "--target-modules", "q_proj,v_proj", "--option", "rho=2"),
        ("--method", "lora_one", "--target-modules", r".*\.(q|v)_proj"),
    ],
)
def test_the_printed_lines_can_be_pasted(more, run, tmp_path):
    done = run(*calibrate_arguments(tmp_path / "c", *more))
    assert done.code == 0, done.err
    config_line, rate_line = done.out.splitlines()[-2:]
    config = eval(config_line, vars(peft_gradinit))
    model = adapted(load_model(ModelSection(name="embedded:pico-llama")), config)
    arguments = eval(f"dict({rate_line.partition('#')[0]})")
    suggested = suggest_learning_rate(model).suggested
    assert arguments == {"learning_rate": pytest.approx(suggested, rel=0.05)}
    content = run(*calibrate_arguments(tmp_path / "d", *more, "--json")).json
    assert content["learning_rate"] == pytest.approx(suggested)
    assert content["config"]["r"] == 4


def test_the_printed_lines_of_a_classifier_can_be_pasted(run, tmp_path):
    rows = [{"text": f"text {i}", "label": ["good", "bad"][i % 2]} for i in range(16)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    more = ("--task", "SEQ_CLS", "--max-length", 16, "--r", 2)
    pico_classifier().save_pretrained(tmp_path / "model")
    pico_tokenizer().save_pretrained(tmp_path / "model")
    done = run("calibrate", tmp_path / "model", tmp_path / "rows.jsonl", tmp_path / "c", *more)
    assert done.code == 0, done.err
    config_line = done.out.splitlines()[-2]
    assert "task_type='SEQ_CLS'" in config_line
    config = eval(config_line, vars(peft_gradinit))
    section = ModelSection(name=str(tmp_path / "model"), task="SEQ_CLS", n_labels=2)
    assert init_report(adapted(load_model(section), config)).method == "LoRA-GA"


def test_packed_rows_give_the_same_in_batches_of_any_size(run, tmp_path):
    more = ("--packing", "--text", "text")
    found = []
    for size in (8, 3):
        done = run(*calibrate_arguments(tmp_path / f"{size}", *more, "--batch-size", size))
        assert done.code == 0, done.err
        found.append(CalibrationResult.load(tmp_path / f"{size}").triplets)
    one, other = found
    for name in one:
        assert relative_error(other[name].S, one[name].S) < 1e-5, name


def test_preferences_are_calibrated_in_training_alone(run, tmp_path):
    done = run(*calibrate_arguments(tmp_path / "c", "--task", "PREFERENCE"))
    assert done.code == 1
    flat = " ".join(done.err.split())
    assert "PREFERENCE cannot be calibrated beforehand" in flat
    assert "`peft-gradinit train RECIPE` starts" in flat


def test_dry_run_says_the_truth(run, workshop, tmp_path):
    done = run(*calibrate_arguments(tmp_path / "c", "--dry-run"))
    assert done.code == 0
    check_snapshot("dry_run", done.out, workshop, tmp_path)
    costs = run(*calibrate_arguments(tmp_path / "c", "--dry-run", "--json")).json
    assert not (tmp_path / "c").exists()
    facts = run(*calibrate_arguments(tmp_path / "c", "--json")).json
    for name in ("n_sequences", "n_tokens"):
        assert costs[name] == facts[name]
    assert costs["n_targets"] == 21
    assert facts["state_bytes"] <= costs["statistic_bytes"] < 1.5 * facts["state_bytes"]
    size = (tmp_path / "c" / "calibration.safetensors").stat().st_size
    assert costs["result_bytes"] < size < costs["result_bytes"] + 40_000
    model = load_model(ModelSection(name="embedded:pico-llama"))
    assert costs["weight_bytes"] == sum(4 * p.numel() for p in model.parameters())


def test_dry_run_needs_no_weights(run, workshop, tmp_path):
    import shutil

    (tmp_path / "shape").mkdir()
    shutil.copy(workshop / "base" / "config.json", tmp_path / "shape")
    done = run(*of_own_data(workshop, tmp_path, "--dry-run"), "--json")
    assert done.code == 0, done.err
    bad = run(*of_own_data(workshop, tmp_path))
    assert bad.code == 1
    assert "cannot load the model" in bad.err


def test_dry_run_needs_a_config_alone(run, tmp_path):
    shape = Path(__file__).parents[2] / "configs" / "shapes" / "llama-2-7b"
    budget = ("--max-length", 512, "--max-tokens", 4096, "--processes", 4, "--dtype", "float32")
    costs = run("calibrate", shape, "--dry-run", *budget, "--json").json
    assert (costs["n_sequences"], costs["n_tokens"], costs["n_processes"]) == (8, 4096, 4)
    assert costs["n_targets"] == 224
    assert costs["agreed_bytes"] == 0  # 8 sequences are too few to orient
    assert 0 < costs["summed_bytes"] < costs["dense_summed_bytes"] / 10
    text = run("calibrate", shape, "--dry-run", *budget).out
    assert re.search(r"^between processes: .* summed, .* broadcast, 4 processes$", text, re.M)
    bad = run("calibrate", shape)
    assert bad.code == 1
    assert "only --dry-run can do without" in bad.err


def of_own_data(workshop, tmp_path, *more):
    """Token ids, since the pico model has no tokenizer of its own: that of the embedded one."""
    if not (tmp_path / "shape" / "tokenizer.json").exists():
        pico_tokenizer().save_pretrained(tmp_path / "shape")
    return ("calibrate", tmp_path / "shape", workshop / "data.jsonl", tmp_path / "c", *more)


@pytest.mark.parametrize("method", [m.name for m in METHODS if m.needed() != "nothing"])
def test_every_method_calibrates(run, tmp_path, method):
    done = run(*calibrate_arguments(tmp_path / "c", "--method", method))
    assert done.code == 0, done.err
    needed = {m.name: m.needed() for m in METHODS}[method]
    assert CalibrationResult.load(tmp_path / "c").need.title == needed


def test_options_of_the_method_and_targets(run, tmp_path):
    more = ("--method", "eva", "--option", "rho=1", "--option", "centered=false")
    done = run(*calibrate_arguments(tmp_path / "c", *more, "--target-modules", "q_proj,v_proj"))
    assert done.code == 0, done.err
    result = CalibrationResult.load(tmp_path / "c")
    assert len(result.triplets) == 6
    assert result.fingerprint.options["centered"] is False
    assert {rank for _, _, rank in result.fingerprint.targets.values()} == {4}


@pytest.mark.parametrize("targets", ["auto", "auto+output", "all-linear", "q_proj , v_proj,"])
def test_words_for_targets_and_spaces_between_names(run, tmp_path, targets):
    more = ("--method", "lora_one", "--target-modules", targets)
    done = run(*calibrate_arguments(tmp_path / "c", *more))
    assert done.code == 0, done.err
    names = CalibrationResult.load(tmp_path / "c").fingerprint.targets
    if targets.startswith("q"):
        assert {name.rpartition(".")[2] for name in names} == {"q_proj", "v_proj"}
    else:
        assert ("lm_head" in names) == (targets == "auto+output")


def test_numbers_of_options_are_read_as_people_write_them():
    job = job_of(**Measured(option=["rho=1e1", "min_rank=2"]).sections("m", "d", "eva"))
    assert job.method.options == {"rho": 10.0, "min_rank": 2}


def test_inspect_a_calibration(run, calibration, workshop, tmp_path):
    done = run("inspect", calibration, "--plot", tmp_path / "pictures")
    assert done.code == 0, done.err
    check_snapshot("inspect_calibration", done.out, workshop, tmp_path)
    for name in ("spectra.png", "ranks.png"):
        assert (tmp_path / "pictures" / name).read_bytes().startswith(b"\x89PNG")
    content = run("inspect", calibration / "calibration.safetensors", "--json").json
    check_snapshot("inspect_calibration.json", json.dumps(kinds(content)), workshop, tmp_path)
    # Half of the rank that was calibrated for, so that there is something to share out.
    assert sum(row["suggested_rank"] for row in content["rows"]) == 2 * len(content["rows"])
    assert all(0 < r["captured"] <= r["captured_by_all"] <= 1 for r in content["rows"])


def test_inspect_a_calibration_that_says_nothing_of_ranks(run, tmp_path):
    assert run(*calibrate_arguments(tmp_path / "c", "--method", "corda")).code == 0
    done = run("inspect", tmp_path / "c", "--json")
    assert done.code == 0, done.err
    assert "suggestion" not in done.json
    assert all(row["norm"] > 0 for row in done.json["rows"])
    for option in (("--rank", 2), ("--plot", tmp_path / "pictures")):
        done = run("inspect", tmp_path / "c", *option)
        assert done.code == 1
        flat = " ".join(done.err.split())
        assert "holds second moments of the inputs, and --rank and --plot need singular" in flat
    assert not (tmp_path / "pictures").exists()


def test_inspect_an_adapter(run, workshop, tmp_path):
    done = run("inspect", workshop / "ga", "--base", workshop / "base", "--plot", tmp_path / "p")
    assert done.code == 0, done.err
    check_snapshot("inspect_adapter", done.out, workshop, tmp_path)
    assert (tmp_path / "p" / "drift.png").exists()
    content = run("inspect", workshop / "lora", "--json").json
    check_snapshot("inspect_adapter.json", json.dumps(kinds(content)), workshop, tmp_path)
    assert run("inspect", workshop / "pissa" / "trained").out.count("convert") == 1


@pytest.mark.parametrize("config_cls", [EvaConfig, LoraGAConfig])
def test_nothing_is_said_of_the_ranks_of_a_start_that_is_zero(run, tmp_path, config_cls):
    options = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    model = adapted(pico_llama(), config_cls(**options, calibration=quiet(token_batches())))
    model.save_pretrained(tmp_path)
    done = run("inspect", tmp_path)
    assert "rank would do" not in done.out
    assert "more rank" not in done.out
    assert "without an update: 2 layers: model.layers.0.self_attn.q_proj, " in done.out


def test_compare_adapters(run, workshop, tmp_path):
    pair = (workshop / "lora", workshop / "other")
    done = run("compare", *pair, "--plot", tmp_path / "p")
    assert done.code == 0, done.err
    check_snapshot("compare", done.out, workshop, tmp_path)
    assert (tmp_path / "p" / "angles.png").exists()
    content = run("compare", *pair, "--json").json
    assert all(len(row["input_angles"]) == 4 for row in content["rows"])
    assert content["only in the first"] == content["only in the second"] == []


def test_compare_names_layers_that_one_adapter_lacks(run, workshop, tmp_path):
    pair = (workshop / "lora", saved_lora(tmp_path / "k", target_modules=["q_proj", "k_proj"]))
    done = run("compare", *pair)
    assert done.code == 0, done.err
    assert "only in the first: 4 layers: model.layers.0.mlp.down_proj, " in done.out
    want = "only in the second: 2 layers: model.layers.0.self_attn.k_proj, model.layers.1."
    assert want in done.out
    assert len(run("compare", *pair, "--json").json["only in the first"]) == 4


def test_compare_calibrations(run, calibration, tmp_path):
    other = tmp_path / "other"
    assert run(*calibrate_arguments(other, "--max-batches", 1)).code == 0
    content = run("compare", calibration, other, "--json").json
    assert content["rows"][0]["cosine"] is None
    same = run("compare", calibration, calibration, "--json").json
    assert same["median of the largest input angles, degrees"] < 0.1


def test_intruders_and_their_mitigation(run, workshop, tmp_path):
    base = ("--base", workshop / "base")
    done = run("compare", workshop / "lora", *base, "--threshold", 0.99)
    assert done.code == 0, done.err
    check_snapshot("intruders", done.out, workshop, tmp_path)
    content = run(
        *("compare", workshop / "lora", *base, "--threshold", 0.99, "--json"),
        *("--mitigate", tmp_path / "m"),
    ).json
    assert content["intruders"] == sum(row["intruders"] for row in content["rows"]) > 0
    changed = logits_on_fresh_base(tmp_path / "m")
    assert relative_error(changed, logits_on_fresh_base(workshop / "lora")) > 1e-4


def test_both_comparisons_in_one_json(run, workshop):
    done = run(*(
        "compare",
        workshop / "lora",
        workshop / "other",
        "--base",
        workshop / "base",
        "--json",
    ))
    assert done.code == 0
    assert set(done.json) == {"comparison", "intruders"}


@pytest.mark.parametrize("way", ["initial", "base"])
def test_convert(run, workshop, tmp_path, way):
    source = {
        "initial": ("--initial", workshop / "pissa" / "initial"),
        "base": ("--base", workshop / "base"),
    }[way]
    done = run("convert", workshop / "pissa" / "trained", tmp_path / "plain", *source)
    assert done.code == 0, done.err
    check_snapshot("convert", done.out, workshop, tmp_path)
    again = run(
        "convert", workshop / "pissa" / "trained", tmp_path / "r2", *source, "--rank", 2, "--json"
    ).json
    assert 0 < again["largest relative error"] < 1
    got = logits_on_fresh_base(tmp_path / "plain")
    model = pico_llama()
    want = logits(PeftModel.from_pretrained(model, workshop / "pissa" / "trained"))
    assert relative_error(got, want) < 2e-5  # PEFT computes PiSSA again on the original model


@pytest.mark.parametrize("target", ["peft", "serving", "merged"])
@pytest.mark.parametrize("adapter", ["ga", "lora"])
def test_export(run, workshop, tmp_path, target, adapter):
    arguments = ("export", workshop / adapter, tmp_path / "out", "--target", target)
    done = run(*arguments, "--base", workshop / "base")
    assert done.code == 0, done.err
    check_snapshot(f"export_{adapter}_{target}", done.out, workshop, tmp_path)
    want = logits_on_fresh_base(workshop / adapter)
    if target == "merged":
        got = logits(type(pico_llama()).from_pretrained(tmp_path / "out").eval())
    else:
        got = logits_on_fresh_base(tmp_path / "out")
    assert relative_error(got, want) < 2e-5


def test_a_merged_model_gets_the_tokenizer_of_its_base(run, workshop, tmp_path):
    shutil.copytree(workshop / "base", tmp_path / "base")
    pico_tokenizer().save_pretrained(tmp_path / "base")
    arguments = ("export", workshop / "lora", tmp_path / "out", "--target", "merged")
    done = run(*arguments, "--base", tmp_path / "base")
    assert "tokenizer or processor: written" in done.out, done.err
    got = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert got("one two")["input_ids"] == pico_tokenizer()("one two")["input_ids"]


LOUD = """
import sys

class Loud:
    def find_spec(self, name, path=None, target=None):
        if name == "trl":
            print("a library says something")

sys.meta_path.insert(0, Loud())
"""


def test_standard_output_holds_results_alone(tmp_path):
    """Libraries such as DeepSpeed write to it as soon as they are imported."""
    (tmp_path / "sitecustomize.py").write_text(LOUD)
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [
            *(sys.executable, "-m", "peft_gradinit_cli", "calibrate", "embedded:pico-llama"),
            *("embedded:docstrings", str(tmp_path / "out"), "--max-tokens", "256", "--json"),
        ],
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "a library says something" in done.stderr
    assert json.loads(done.stdout)["n_tokens"] > 0
