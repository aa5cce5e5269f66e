"""Bad input to every command: a clear error, a non-zero exit, nothing half-written."""

import errno
import json
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from peft import IA3Config, get_peft_model
from safetensors import SafetensorError

import peft_gradinit.records.adapters as adapters
import peft_gradinit.statistics.store as store
from peft_gradinit import CalibrationResult
from tests.cli.conftest import calibrate_arguments
from tests.helpers import pico_llama
from tests.saved.adapters import saved_lora


def failed(done, *parts):
    assert done.code == 1
    assert done.out == ""
    assert "error: " in done.err
    assert "Traceback" not in done.err
    flat = " ".join(done.err.split())
    for part in parts:
        assert part in flat, done.err


@pytest.mark.parametrize("command", ["inspect", "compare"])
def test_a_base_of_the_same_shape_with_other_weights_is_told(run, workshop, tmp_path, command):
    """Of a quantised base the weights that it was quantised from are the ones to look at."""
    pico_llama(seed=3).save_pretrained(tmp_path / "base")
    with pytest.warns(UserWarning, match=r"on another base model.*only if its base was quantised"):
        done = run(command, workshop / "ga", "--base", tmp_path / "base")
    assert done.code == 0, done.err
    done = run(command, workshop / "lora", "--base", tmp_path / "base")  # says nothing of its base
    assert done.code == 0, done.err


@pytest.fixture
def foreign(tmp_path) -> Path:
    """An adapter of another kind."""
    model = get_peft_model(pico_llama(), IA3Config(task_type="CAUSAL_LM"))
    model.save_pretrained(tmp_path / "ia3")
    return tmp_path / "ia3"


@pytest.mark.parametrize(
    "line",
    [
        ("inspect", "MISSING"),
        ("compare", "MISSING", "MISSING"),
        ("compare", "LORA", "MISSING"),
        ("convert", "MISSING", "OUT", "--base", "BASE"),
        ("convert", "PISSA", "OUT", "--initial", "MISSING"),
        ("convert", "PISSA", "OUT", "--base", "MISSING"),
        ("export", "MISSING", "OUT", "--base", "BASE"),
        ("export", "LORA", "OUT", "--base", "MISSING"),
        ("calibrate", "MISSING", "embedded:docstrings", "OUT"),
        ("calibrate", "embedded:pico-llama", "MISSING", "OUT"),
        ("calibrate", "embedded:pico-llama", "MISSING.jsonl", "OUT"),
    ],
    ids=" ".join,
)
def test_missing_files(run, workshop, tmp_path, line):
    done = run(*filled(line, workshop, tmp_path))
    failed(done, "missing")
    assert not (tmp_path / "out").exists()


def filled(line, workshop, tmp_path):
    places = {
        "MISSING": tmp_path / "missing",
        "MISSING.jsonl": tmp_path / "missing.jsonl",
        "OUT": tmp_path / "out",
        "LORA": workshop / "lora",
        "PISSA": workshop / "pissa" / "trained",
        "BASE": workshop / "base",
        "FOREIGN": tmp_path / "ia3",
        "DATA": workshop / "data.jsonl",
    }
    return [places.get(word, word) for word in line]


@pytest.mark.parametrize(
    ("line", "needed"),
    [
        (("compare", "LORA", "LORA", "--rank", "4"), "--base"),
        (("compare", "LORA", "LORA", "--top", "3"), "--base"),
        (("compare", "LORA", "LORA", "--threshold", "0.5"), "--base"),
        (("compare", "LORA", "--base", "BASE", "--factor", "0.5"), "--mitigate"),
        (("compare", "LORA", "--base", "BASE", "--overwrite"), "--mitigate"),
        (("calibrate", "BASE", "DATA", "OUT", "--processes", "2"), "--dry-run"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_options_that_would_be_ignored(run, workshop, tmp_path, line, needed):
    done = run(*filled(line, workshop, tmp_path))
    assert (done.code, done.out) == (2, "")
    flat = " ".join(done.err.replace("│", " ").split())
    assert f"means nothing without {needed}; give that, or leave this one out." in flat


@pytest.mark.parametrize(
    "line",
    [
        ("inspect", "FOREIGN"),
        ("compare", "LORA", "FOREIGN"),
        ("convert", "FOREIGN", "OUT", "--base", "BASE"),
        ("export", "FOREIGN", "OUT", "--base", "BASE"),
    ],
    ids=" ".join,
)
@pytest.mark.usefixtures("foreign")
def test_foreign_adapters(run, workshop, tmp_path, line):
    failed(run(*filled(line, workshop, tmp_path)), "IA3 adapter where plain LoRA is expected")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("line", "part"),
    [
        (("inspect", "DATA"), "adapter_config.json"),
        (("compare", "LORA"), "give a second adapter"),
        (("compare", "LORA", "--base", "BASE", "--plot", "OUT"), "--plot draws the angles between"),
        (("inspect", "LORA", "--rank", "2"), "--rank is for calibrations"),
        (("compare", "LORA", "LORA", "--mitigate", "OUT"), "--mitigate needs"),
        (("convert", "PISSA", "OUT"), "give --initial, or --base"),
        (("convert", "LORA", "OUT", "--base", "BASE"), "nothing to convert"),
        (("export", "LORA", "OUT", "--base", "BASE", "--target", "gguf"), "must be one of"),
        (("export", "PISSA", "OUT", "--base", "BASE"), "peft-gradinit convert"),
        (("export", "LORA", "OUT", "--base", "embedded:pico-llama"), "does not fit"),
        (("compare", "LORA", "--base", "embedded:pico-llama"), "does not fit"),
        (("calibrate", "BASE", "DATA", "OUT", "--method", "svfit"), "method must be one of"),
        (("calibrate", "BASE", "DATA", "OUT", "--dtype", "int3"), "dtype"),
        (("calibrate", "BASE", "DATA", "OUT", "--estimator", "guess"), "estimator"),
        (("calibrate", "BASE", "DATA", "OUT", "--option", "tau"), "KEY=VALUE"),
        (("calibrate", "BASE", "DATA", "OUT", "--option", "scle=gd"), "did you mean 'scale'"),
        (("calibrate", "BASE", "DATA", "OUT", "--option", "scale=[gd"), "the value is not YAML"),
        (("calibrate", "BASE", "DATA", "OUT", "--device", "gpu"), "--device 'gpu' cannot be used"),
        (("calibrate", "BASE", "DATA", "OUT", "--device", "cuda:99"), "--device 'cuda:99' cannot"),
        (("calibrate", "BASE", "DATA", "OUT"), "cannot load the tokenizer"),
        (("calibrate", "embedded:minlm", "DATA", "OUT"), "did you mean 'embedded:minilm'"),
        (("start", "BASE", "DATA", "OUT", "--method", "lora"), "method must be one of"),
        (("start", "BASE", "DATA", "OUT"), "cannot load the tokenizer"),
        (("start", "embedded:minlm", "DATA", "OUT"), "did you mean 'embedded:minilm'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_wrong_kinds_and_options(run, workshop, tmp_path, line, part):
    failed(run(*filled(line, workshop, tmp_path)), part)
    assert not (tmp_path / "out").exists()


def test_a_model_in_place_of_data(run, workshop, tmp_path):
    done = run("calibrate", "embedded:pico-llama", workshop / "base", tmp_path / "out")
    failed(done)
    # Whether its config.json can be read as a row depends on the version of datasets.
    assert re.search(r"do not tell what to read|cannot read the data '\S+base'", done.err)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("content", "options", "part"),
    [
        ("", (), "is empty"),
        ("{not json", (), "Mend the file, or give another one."),
        ('{"question": "a"}', (), "do not tell what to read"),
        ('{"text": "a"}', ("--text", "txet"), "did you mean 'text'"),
        ('{"text": "a"}', ("--text", "{textt}!"), "asks for the column 'textt'"),
        ('{"text": "a"}', ("--split", "train[bad"), "has the splits ['train'], got 'train[bad'"),
        ('{"messages": 3}', (), "a chat is a list of"),
        (
            '{"messages": [{"role": "user", "content": "a"}]}',
            ("--chat-template", "no"),
            "cannot read",
        ),
        ('{"prompt": "a", "completion": null}', (), "is empty in a row"),
    ],
)
def test_bad_data(run, tmp_path, content, options, part):
    data = tmp_path / "data.jsonl"
    data.write_text(content)
    done = run("calibrate", "embedded:pico-llama", data, tmp_path / "out", *options)
    failed(done, part)
    assert not (tmp_path / "out").exists()


def test_an_unknown_kind_of_file(run, tmp_path):
    (tmp_path / "data.docx").write_text("text")
    done = run("calibrate", "embedded:pico-llama", tmp_path / "data.docx", tmp_path / "out")
    failed(done, "ends in '.docx'; expected one of .jsonl")


def test_damaged_calibrations(run, calibration):
    file = calibration / "calibration.safetensors"
    file.write_bytes(file.read_bytes()[:100])
    failed(run("inspect", calibration), "cannot read a calibration")


def test_a_base_for_a_calibration_is_refused(run, calibration, workshop):
    done = run("inspect", calibration, "--base", workshop / "base")
    failed(done, "--base is for adapters", "is a calibration; leave it out")


def test_a_calibration_and_an_adapter_are_not_compared(run, calibration, workshop):
    done = run("compare", calibration, workshop / "lora")
    failed(done, "is a calibration and", "is an adapter; compare two of one kind")


def test_an_adapter_that_names_no_base_needs_one(run, workshop, tmp_path):
    shutil.copytree(workshop / "lora", tmp_path / "lora")
    config = tmp_path / "lora" / "adapter_config.json"
    nameless = {**json.loads(config.read_text()), "base_model_name_or_path": None}
    config.write_text(json.dumps(nameless))
    done = run("export", tmp_path / "lora", tmp_path / "out")
    failed(done, "does not name its base model; give --base")
    assert not (tmp_path / "out").exists()


def test_results_are_not_overwritten_by_chance(run, calibration, workshop, tmp_path):
    before = (calibration / "calibration.safetensors").read_bytes()
    failed(run(*calibrate_arguments(calibration, "--seed", 1)), "holds a calibration already")
    assert (calibration / "calibration.safetensors").read_bytes() == before
    assert run(*calibrate_arguments(calibration, "--seed", 1, "--overwrite")).code == 0
    saved_lora(tmp_path / "there")
    line = ("convert", workshop / "pissa" / "trained", tmp_path / "there")
    line = (*line, "--base", workshop / "base")
    failed(run(*line), "holds an export already")
    assert run(*line, "--overwrite").code == 0
    (calibration / "notes.txt").write_text("mine")
    done = run("export", workshop / "lora", calibration, "--base", workshop / "base", "--overwrite")
    failed(done, "notes.txt")


OUTPUTS = [
    ("calibrate", "embedded:pico-llama", "embedded:docstrings", "OUT", "--max-tokens", "256"),
    ("start", "embedded:pico-llama", "embedded:docstrings", "OUT", "--max-tokens", "256"),
    ("convert", "PISSA", "OUT", "--base", "BASE"),
    ("export", "LORA", "OUT", "--base", "BASE"),
    ("compare", "LORA", "--base", "BASE", "--mitigate", "OUT"),
    ("compare", "LORA", "LORA", "--plot", "OUT"),
]


@pytest.mark.parametrize("line", OUTPUTS[2:5], ids=lambda line: line[0])
def test_a_place_is_refused_before_there_is_work(run, workshop, tmp_path, line):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    line = ["MISSING" if word == "BASE" else word for word in line]  # would be read next
    failed(run(*filled(line, workshop, tmp_path)), "notes.txt")


@pytest.mark.parametrize("line", OUTPUTS[1:5], ids=lambda line: line[0])
def test_the_option_that_replaces_an_export_is_named(run, workshop, tmp_path, line):
    saved_lora(tmp_path / "out")
    failed(run(*filled(line, workshop, tmp_path)), "holds an export already", "--overwrite)")


@pytest.mark.parametrize("line", OUTPUTS, ids=lambda line: line[0] + " " + line[-2])
def test_an_output_below_a_file(run, workshop, tmp_path, line):
    (tmp_path / "file").write_text("mine")
    line = [word if word != "OUT" else str(tmp_path / "file" / "out") for word in line]
    failed(run(*filled(line, workshop, tmp_path)), str(tmp_path / "file"))
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.skipif(sys.platform != "linux", reason="needs a folder that nobody can write to")
@pytest.mark.parametrize("line", OUTPUTS, ids=lambda line: line[0] + " " + line[-2])
def test_read_only_places(run, workshop, tmp_path, line):
    line = [word if word != "OUT" else "/proc/out" for word in line]
    failed(run(*filled(line, workshop, tmp_path)), "/proc")


FULL = "No space left on device"


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, FULL),
        SafetensorError(f"Error while serializing: {FULL} (os error 28)"),
    ],
    ids=["python", "rust"],
)
@pytest.mark.parametrize("line", OUTPUTS[:5], ids=lambda line: line[0] + " " + line[-2])
def test_a_full_disk_leaves_nothing(run, workshop, tmp_path, line, error, monkeypatch):
    def full(tensors, path, metadata=None):
        Path(path).write_bytes(b"half of it")
        raise error

    for module in (store, adapters, sys.modules["peft_gradinit.export.adapter"]):
        monkeypatch.setattr(module, "save_file", full)
    monkeypatch.setattr("peft.peft_model.safe_save_file", full)
    failed(run(*filled(line, workshop, tmp_path)), "cannot write", "the disk is full")
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


@pytest.mark.slow
def test_a_real_limit_on_the_size_of_files(workshop, tmp_path):
    """The whole command in a process that may write 64 KiB at most."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**16, 2**16))

    done = subprocess.run(
        [sys.executable, "-m", "peft_gradinit_cli", *map(str, calibrate_arguments(tmp_path / "c"))],
        preexec_fn=limit,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1
    assert "error: cannot write" in done.stderr
    assert "larger than is allowed" in " ".join(done.stderr.split())
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_an_interrupt_is_no_traceback_and_leaves_nothing(run, tmp_path, monkeypatch):
    def interrupted(tensors, path, metadata=None):
        Path(path).write_bytes(b"half of it")
        raise KeyboardInterrupt

    monkeypatch.setattr(store, "save_file", interrupted)
    done = run(*calibrate_arguments(tmp_path / "c"))
    assert done.code == 130
    assert [p for p in tmp_path.rglob("*") if p.is_file()] == []


def test_the_traceback_is_there_on_demand(run, tmp_path, monkeypatch):
    from peft_gradinit.errors import AdapterError

    monkeypatch.setenv("PEFT_GRADINIT_TRACEBACK", "1")
    with pytest.raises(AdapterError):
        run("inspect", tmp_path / "missing")


N_TOKENS = 4096


def big_calibration(output, *more):
    arguments = calibrate_arguments(output, "--max-tokens", N_TOKENS, "--batch-size", 2, *more)
    return [sys.executable, "-m", "peft_gradinit_cli", *map(str, arguments)]


@pytest.mark.slow
def test_killed_and_run_again_it_gives_the_same(tmp_path):
    """SIGKILL as soon as a part is saved; the second run finds it and ends with the same bits."""
    want = tmp_path / "whole"
    subprocess.run(big_calibration(want), check=True, capture_output=True)
    victim = subprocess.Popen(
        big_calibration(tmp_path / "c", "--save-every", 0),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    partial = tmp_path / "c" / "partial.safetensors"
    while not partial.exists() and victim.poll() is None:
        time.sleep(0.005)
    victim.kill()
    assert victim.wait() == -signal.SIGKILL
    assert partial.exists()
    assert not (tmp_path / "c" / "calibration.safetensors").exists()
    done = subprocess.run(
        [*big_calibration(tmp_path / "c"), "--json"], check=True, capture_output=True, text=True
    )
    assert json.loads(done.stdout)["n_tokens"] >= N_TOKENS
    assert not partial.exists()
    one, other = CalibrationResult.load(tmp_path / "c"), CalibrationResult.load(want)
    assert one.energy == other.energy
    for name, svd in other.triplets.items():
        assert all(a.equal(b) for a, b in zip(one.triplets[name], svd, strict=True))
