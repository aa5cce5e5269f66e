"""The wheel holds what it needs and nothing else, and works where the checkout is not."""

import os
import re
import subprocess
import sys
import zipfile
from email import message_from_string
from pathlib import Path

import pytest

import peft_gradinit

ROOT = Path(__file__).parent.parent
PACKAGES = ("peft_gradinit", "peft_gradinit_cli")
DATA = {"configs": "peft_gradinit/recipes/configs"}
PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")
TRY = """
from pathlib import Path
import peft_gradinit, peft_gradinit_cli
from peft import PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "vocab_size": 64}
base = LlamaForCausalLM(LlamaConfig(num_attention_heads=2, **sizes))
model = get_peft_model(base, peft_gradinit.PiSSAConfig(r=2, target_modules="all-linear"))
model.save_pretrained("adapter")
PeftModel.from_pretrained(LlamaForCausalLM(base.config), "adapter")
for module in (peft_gradinit, peft_gradinit_cli):
    print(Path(module.__file__).parent.parent)
"""


def run(*command, cwd, **environment):
    done = subprocess.run(
        list(map(str, command)), cwd=cwd, env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    run(*PIP, "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, ROOT, cwd=folder)
    (file,) = folder.glob("*.whl")
    return file


def files_below(folder, name):
    found = (path for path in folder.rglob("*") if path.is_file())
    return {
        f"{name}/{path.relative_to(folder).as_posix()}"
        for path in found
        if "__pycache__" not in path.parts
    }


def test_it_holds_the_packages_and_the_recipes_alone(wheel):
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        about = {name.partition(".dist-info/")[2] for name in archive.namelist()} - {""}
    wanted = {file for name in PACKAGES for file in files_below(ROOT / name, name)}
    for folder, name in DATA.items():
        wanted |= files_below(ROOT / folder, name)
    assert held == wanted
    assert "peft_gradinit/py.typed" in held
    assert about == {"METADATA", "WHEEL", "RECORD", "entry_points.txt", "licenses/LICENSE"}


def test_what_it_says_of_itself(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/METADATA"))
        said = message_from_string(archive.read(name).decode())
    assert {"cli", "plots", "docs", "dev", "quickstart"} == set(said.get_all("Provides-Extra"))
    urls = dict(url.split(", ") for url in said.get_all("Project-URL"))
    assert {"Homepage", "Documentation", "Repository", "Issues", "Changelog"} == set(urls)
    assert all(re.match(r"https://[\w.-]*github\.(com|io)/", url) for url in urls.values())
    version = re.search(r"^version: (\S+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert version.group(1) == said["Version"]


@pytest.mark.slow
def test_it_works_where_the_checkout_is_not(wheel, tmp_path):
    site = tmp_path / "site"
    run(*PIP, "install", "--quiet", "--no-deps", "--target", site, wheel, cwd=tmp_path)
    paths = {"PYTHONPATH": str(site)}
    printed = run(sys.executable, "-c", TRY, cwd=tmp_path, **paths)
    assert printed.splitlines() == [str(site)] * 2
    command = (sys.executable, "-m", "peft_gradinit_cli")
    assert peft_gradinit.__version__ in run(*command, "--version", cwd=tmp_path, **paths)
    assert "offline/minilm_docstrings" in run(*command, "train", "--list", cwd=tmp_path, **paths)
