"""The documentation builds without a warning, and its links and code are good."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
REPOSITORY = "https://github.com/peft-gradinit/peft_gradinit"
IDS = [str(page.relative_to(ROOT)) for page in PAGES]


def links(page):
    """Targets of a page's links, code left out."""
    text = re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(), flags=re.DOTALL)
    return re.findall(r"\]\(([^)\s]+)\)", text)


def test_the_site_builds_without_a_warning(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", tmp_path / "site"],
        cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    output = done.stdout + done.stderr
    assert done.returncode == 0, output[-3000:]
    assert "WARNING" not in output
    built = [p.relative_to(tmp_path / "site") for p in (tmp_path / "site").rglob("index.html")]
    assert len(built) == len(list((ROOT / "docs").rglob("*.md")))
    api = (tmp_path / "site" / "api" / "adapters" / "index.html").read_text()
    assert "peft_gradinit.LoraGAConfig" in api
    assert "rank_allocation" in api


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_links_to_files_lead_somewhere(page):
    for link in links(page):
        path = link.partition("#")[0]
        if path.startswith(f"{REPOSITORY}/blob/main/"):
            assert (ROOT / path.removeprefix(f"{REPOSITORY}/blob/main/")).exists(), link
        elif path and "://" not in path:
            assert (page.parent / path).exists(), link


def test_anchors_of_the_readme_exist():
    for link in links(ROOT / "README.md"):
        path, _, anchor = link.partition("#")
        if anchor:
            heads = re.findall(r"^#+ (.*)$", (ROOT / path).read_text(), flags=re.MULTILINE)
            assert anchor in {head.lower().replace(" ", "-") for head in heads}, link


@pytest.mark.parametrize("page", PAGES, ids=IDS)
def test_every_block_of_python_compiles(page):
    for code in re.findall(r"```python\n(.*?)```", page.read_text(), flags=re.DOTALL):
        compile(code, str(page), "exec")


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150
