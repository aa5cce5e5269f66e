"""Test suites of our hosts: fetched once, run in a process of their own, held against a table."""

import dataclasses
import os
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Mapping
from pathlib import Path

from huggingface_hub import cached_assets_path

ROOT = Path(__file__).parents[1]


class UnreachableError(Exception):
    """There is no copy of a host's tests, and none can be downloaded."""


def cached_source(name: str, download: Callable[[Path], None]) -> Path:
    """The folder `name` of the cache; if it is missing, `download` makes it in the folder it gets."""
    place = Path(cached_assets_path("peft_gradinit", namespace="sources")) / name
    if not place.exists():
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            download(Path(folder))
            (Path(folder) / name).rename(place)
    return place


@dataclasses.dataclass(frozen=True)
class Expected:
    """A failure that is right.

    Attributes:
        says: what the error says.
        reason: why that is right.
    """

    says: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Outcomes:
    """What a run gave, by `module::test`.

    Attributes:
        passed: tests that passed.
        failed: what the others said.
        output: the end of what pytest printed.
    """

    passed: frozenset[str]
    failed: Mapping[str, str]
    output: str

    def against(self, expected: Mapping[str, Expected]) -> list[str]:
        """What differs: failures that are not expected, and expected ones that are none."""
        complaints = [
            f"{test} failed: {said[:600]}"
            for test, said in self.failed.items()
            if test not in expected or expected[test].says not in said
        ]
        stale = sorted(set(expected) & self.passed)
        complaints += [f"{test} passes; take it out of the table" for test in stale]
        unknown = sorted(set(expected) - self.passed - set(self.failed))
        return complaints + [f"{test} was not run; take it out of the table" for test in unknown]


def run(folder: Path, *arguments: str, env: Mapping[str, str]) -> Outcomes:
    """Run a suite in a folder; its own modules win over installed ones, and ours can be imported."""
    report = folder / "report.xml"
    base = (*("-q", "-p", "no:cacheprovider", "-c", os.devnull), "--rootdir", str(folder))
    paths = os.pathsep.join([str(folder), str(ROOT)])
    fixed = {"PYTHONPATH": paths, "PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1"}
    known = {**os.environ, **fixed, **env}  # what an error says depends on the order of sets
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *base, f"--junitxml={report}", *arguments],
        cwd=folder,
        env=known,
        capture_output=True,
        text=True,
        check=False,
    )
    output = (done.stdout + done.stderr)[-3000:]
    if done.returncode not in (0, 1):  # neither all passed nor some failed
        raise RuntimeError(f"the suite did not run:\n{output}")
    return _read(report, output)


def _read(report: Path, output: str) -> Outcomes:
    passed, failed = set(), {}
    for case in ElementTree.parse(report).iter("testcase"):
        module = next(p for p in case.attrib["classname"].split(".") if p.startswith("test_"))
        test = f"{module}::{case.attrib['name']}"
        if (fault := case.find("failure")) is not None or (fault := case.find("error")) is not None:
            failed[test] = f"{fault.attrib.get('message')}\n{(fault.text or '')[-3000:]}"
        elif case.find("skipped") is None:
            passed.add(test)
    return Outcomes(frozenset(passed - set(failed)), failed, output)
