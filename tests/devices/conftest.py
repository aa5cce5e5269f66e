"""Each file here runs in a process of its own, on the stand-in for an accelerator (`backend.py`).

Loading the stand-in changes the whole process, so the process of the other tests never does. For
them a file is one test, a slow one if `SLOW` stands in it. To run some of its tests alone:

    STANDIN=1 python -m pytest tests/devices/test_faults.py -k eigh
"""

import os
import subprocess
import sys

import pytest

from tests.devices import backend

SLOW = "pytestmark = pytest.mark.slow"
_IS_OWN_PROCESS = os.environ.get("STANDIN") == "1"

if _IS_OWN_PROCESS:
    backend.load()


def pytest_pycollect_makemodule(module_path, parent):
    return None if _IS_OWN_PROCESS else _File.from_parent(parent, path=module_path)


class _File(pytest.File):
    """A file of device tests, as one test."""

    def collect(self):
        item = _OwnProcess.from_parent(self, name=f"on_{backend.NAME}")
        if SLOW in self.path.read_text(encoding="utf-8").splitlines():
            item.add_marker(pytest.mark.slow)
        yield item


class _OwnProcess(pytest.Item):
    """Runs the file by a pytest of its own."""

    def runtest(self):
        if reason := backend.missing():
            pytest.skip(reason)
        backend.built()
        markers = ["-m", self.config.option.markexpr] if self.config.option.markexpr else []
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *markers, self.path],
            cwd=self.config.rootpath,
            env={**os.environ, "STANDIN": "1", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=1200,
            check=False,
        )
        if done.returncode not in (0, pytest.ExitCode.NO_TESTS_COLLECTED):
            raise _FailedError(done.stdout[-20000:] + done.stderr[-4000:])

    def repr_failure(self, excinfo, style=None):
        if isinstance(excinfo.value, _FailedError):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)

    def reportinfo(self):
        return self.path, 0, f"{self.path.name} on {backend.NAME}"


class _FailedError(Exception):
    """The output of a pytest that failed."""
