"""PEFT's own tests, which its source distribution has."""

import subprocess
import sys
import tarfile
from pathlib import Path

from tests.host_suites import UnreachableError, cached_source

VERSION = "0.21.2"


def peft_tests() -> Path:
    """The folder of PEFT's tests, downloaded once.

    Raises:
        UnreachableError: if they cannot be downloaded.
    """
    return cached_source(f"peft-{VERSION}", _download) / "tests"


def _download(folder: Path) -> None:
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(folder)]
    done = subprocess.run(
        [*pip, "--no-deps", "--no-build-isolation", "--no-binary", "peft", f"peft=={VERSION}"],
        capture_output=True,
        text=True,
        check=False,
    )
    found = list(folder.glob("peft-*.tar.gz"))
    if done.returncode or not found:
        raise UnreachableError(
            f"the source distribution of PEFT {VERSION}, which has its tests, cannot be "
            f"downloaded: {done.stderr[-300:]}"
        )
    with tarfile.open(found[0]) as archive:
        archive.extractall(folder, filter="data")
