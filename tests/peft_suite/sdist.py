"""PEFT's own tests, which its source distribution has."""

import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from huggingface_hub import cached_assets_path

VERSION = "0.21.2"


class UnreachableError(Exception):
    """There is no copy of the tests, and none can be downloaded."""


def peft_tests() -> Path:
    """The folder of PEFT's tests, downloaded once.

    Raises:
        UnreachableError: if they cannot be downloaded.
    """
    place = Path(cached_assets_path("peft_gradinit", namespace="sources")) / f"peft-{VERSION}"
    if not place.exists():
        _download(place)
    return place / "tests"


def _download(place: Path) -> None:
    with tempfile.TemporaryDirectory(dir=place.parent) as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", folder]
        done = subprocess.run(
            [*pip, "--no-deps", "--no-build-isolation", "--no-binary", "peft", f"peft=={VERSION}"],
            capture_output=True,
            text=True,
            check=False,
        )
        found = list(Path(folder).glob("peft-*.tar.gz"))
        if done.returncode or not found:
            raise UnreachableError(
                f"the source distribution of PEFT {VERSION}, which has its tests, cannot be "
                f"downloaded: {done.stderr[-300:]}"
            )
        with tarfile.open(found[0]) as archive:
            archive.extractall(folder, filter="data")
        (Path(folder) / place.name).rename(place)
