"""One workshop of models, adapters and data on disk, for all tests of the command line."""

import contextlib
import io
import json
import os
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from peft_gradinit_cli import main
from tests.helpers import adapted, lora_ga, pico_llama, train_steps
from tests.saved.adapters import lora_config, overwriting_start, saved_lora

SNAPSHOTS = Path(__file__).parent / "snapshots"


@dataclass
class Done:
    """What a command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


@pytest.fixture
def run(monkeypatch):
    """Run the command line in the process; returns exit code and output."""

    def run_(*arguments: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["peft-gradinit", *map(str, arguments)])
        out, err = io.StringIO(), io.StringIO()
        code: Any = 0
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                main()
            except SystemExit as error:
                code = error.code
        return Done(code or 0, out.getvalue(), err.getvalue())

    return run_


@pytest.fixture(scope="session")
def workshop(tmp_path_factory) -> Path:
    """`base/`, `lora/`, `other/`, `ga/`, `pissa/{initial,trained}`, and `data.jsonl`."""
    folder = tmp_path_factory.mktemp("workshop")
    torch.manual_seed(0)
    pico_llama().save_pretrained(folder / "base")
    saved_lora(folder / "lora")
    saved_lora(folder / "other", seed=1)
    model = adapted(pico_llama(), lora_ga(r=2))
    train_steps(model, 3)
    model.save_pretrained(folder / "ga")
    overwriting_start(folder / "pissa", lora_config("pissa"))
    rows = [{"prompt": f"What is {i} + {i}?", "completion": str(2 * i)} for i in range(40)]
    (folder / "data.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return folder


@pytest.fixture
def calibration(run, tmp_path) -> Path:
    """A small calibration, made by the command."""
    done = run(*calibrate_arguments(tmp_path / "calibration"))
    assert done.code == 0, done.err
    return tmp_path / "calibration"


def calibrate_arguments(output: Path, *more: object) -> tuple[object, ...]:
    return (
        *("calibrate", "embedded:pico-llama", "embedded:docstrings", output),
        *("--max-length", 48, "--max-tokens", 1024, "--r", 4, *more),
    )


def check_snapshot(name: str, text: str, workshop: Path, tmp_path: Path) -> None:
    """Compare the structure of an output with the stored one; `UPDATE_SNAPSHOTS=1` stores it."""
    got = structure(text, workshop, tmp_path)
    path = SNAPSHOTS / f"{name}.txt"
    if os.environ.get("UPDATE_SNAPSHOTS"):
        path.parent.mkdir(exist_ok=True)
        path.write_text(got)
    assert got == path.read_text()


def structure(text: str, workshop: Path, tmp_path: Path) -> str:
    """The words and lines of a text: numbers, their signs and the space around them do not count."""
    text = text.replace(str(workshop), "WORKSHOP").replace(str(tmp_path), "TMP")
    text = re.sub(r"(?<![\w.])[-+]?\d[\d,.]*(e[-+]?\d+)?", "#", text)
    text = re.sub(r"[ \t]+", " ", text)
    text = re.sub(r"#( ?#)+", "#", text.replace(", ", " "))  # lists of any length
    text = re.sub(r"^(suggestion:|could use more|less rank).*\n", "", text, flags=re.MULTILINE)
    return "\n".join(line.strip() for line in text.splitlines()) + "\n"


def kinds(value: Any) -> Any:
    """JSON with the kinds of its values; of a list, its first element."""
    if isinstance(value, dict):
        return {key: kinds(v) for key, v in value.items()}
    if isinstance(value, list):
        return [kinds(value[0])] if value else []
    return "number" if isinstance(value, int | float) else type(value).__name__
