"""A method is added exactly as CONTRIBUTING.md says, and the laws of all methods hold for it."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "CONTRIBUTING.md").read_text()


def put_before(path, mark, text):
    """Insert a line above the first line that begins with `mark`."""
    content = path.read_text()
    assert re.search(rf"^{re.escape(mark)}", content, flags=re.MULTILINE), (path, mark)
    pattern = rf"^(?={re.escape(mark)})"
    path.write_text(re.sub(pattern, f"{text}\n", content, count=1, flags=re.MULTILINE))


def with_toy_method(folder):
    """A copy of the package and its tests with the document's file, its row and its test row."""
    ignore = shutil.ignore_patterns("__pycache__")
    for name in ("peft_gradinit", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignore)
    shutil.copy(ROOT / "pyproject.toml", folder)
    methods, contract = folder / "peft_gradinit" / "methods", "tests/methods/test_contract.py"
    (file,) = re.findall(r"`peft_gradinit/methods/(\w+\.py)`\. It opens", TEXT)
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    (methods / file).write_text(code)
    put_before(methods / "table.py", "METHODS = (", "from .toy import ToyConfig\n")
    put_before(methods / "table.py", ")", "    ToyConfig,")
    put_before(folder / contract, "ROWS = {", "from peft_gradinit.methods.toy import ToyConfig\n")
    put_before(folder / contract, "}", '    "toy": ToyConfig,')
    return contract


@pytest.mark.slow
def test_a_method_is_added_as_the_document_says(tmp_path):
    contract = with_toy_method(tmp_path)
    command = [sys.executable, "-m", "pytest", contract, "-p", "no:xdist", "-q", "-k", "toy"]
    environment = {**os.environ, "PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert int(re.search(r"(\d+) passed", done.stdout).group(1)) > 40


def test_the_document_fits_a_screen():
    assert len(TEXT.splitlines()) < 60
