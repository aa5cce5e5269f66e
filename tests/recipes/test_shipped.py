"""Recipes come with the wheel."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_wheel_holds_the_recipes_and_trains_without_the_checkout(tmp_path):
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet")
    subprocess.run([*pip, "--no-deps", "--wheel-dir", tmp_path, ROOT], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "installed")
    tops = {name.partition("/")[0] for name in names if ".dist-info" not in name}
    assert tops == {"peft_gradinit", "peft_gradinit_cli"}
    assert "peft_gradinit/py.typed" in names
    inside = {n.removeprefix("peft_gradinit/recipes/") for n in names if "recipes/configs/" in n}
    files = (p for p in (ROOT / "configs").rglob("*") if p.is_file())
    assert inside == {p.relative_to(ROOT).as_posix() for p in files}
    done = subprocess.run(
        [sys.executable, "-m", "peft_gradinit_cli", "train", "--list", "--json"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "installed")},
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    recipes = {row["recipe"] for row in json.loads(done.stdout)["rows"]}
    assert "small/smollm2_135m_chat" in recipes
