"""The commands of the documentation, as a new user would type them."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from peft_gradinit import CalibrationResult
from tests.cli.conftest import calibrate_arguments

ROOT = Path(__file__).parent.parent.parent
GUIDES = ROOT / "docs" / "guides"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def commands(page):
    """Arguments of the commands of a page, without `peft-gradinit`."""
    text = (GUIDES / page).read_text().replace("\\\n", " ")
    blocks = re.findall(r"```bash\n(.*?)```", text, flags=re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [shlex.split(line)[1:] for line in lines if line]


def test_every_command_of_the_guide_works(run, workshop, tmp_path, monkeypatch):
    places = {
        "ADAPTER": workshop / "lora",
        "OTHER": workshop / "other",
        "MODEL": workshop / "base",
        "PISSA_ADAPTER": workshop / "pissa" / "trained",
    }
    monkeypatch.chdir(tmp_path)
    seen = set()
    for command in commands("command-line.md"):
        done = run(*(places.get(word, word) for word in command))
        assert done.code == 0, (command, done.err)
        assert done.out
        seen.add(command[0])
    assert seen == {"doctor", "calibrate", "start", "inspect", "compare", "convert", "export"}


def test_every_recipe_of_the_guide_is_valid(run):
    listing, *trainings = commands("recipes.md")
    assert trainings[0][1] in run(*listing).out
    for command in trainings:
        done = run(*command, "--check")
        assert done.code == 0, (command, done.err)


def test_recipes_of_the_pages_exist():
    named = {n for page in PAGES for n in re.findall(r"(configs/[\w/]+\.\w+)", page.read_text())}
    assert named
    for name in named:
        assert (ROOT / name).exists(), name


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(run, tmp_path):
    assert run(*calibrate_arguments(tmp_path / "one")).code == 0
    # `accelerate launch --cpu` starts one process where there is no MPI.
    launch = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    command = ("-m", "--", "peft_gradinit_cli", *calibrate_arguments(tmp_path / "two", "--json"))
    done = subprocess.run(
        [sys.executable, *launch, *map(str, command)],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count('"n_tokens"') == 1  # one process speaks for both
    one, two = (CalibrationResult.load(tmp_path / name) for name in ("one", "two"))
    assert one.facts.n_tokens == two.facts.n_tokens
    for name, energy in one.energy.items():
        assert two.energy[name] == pytest.approx(energy, rel=1e-3)
