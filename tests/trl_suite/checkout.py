"""TRL's source with its tests, which its packages are without."""

import os
import tarfile
import urllib.error
import urllib.request
from pathlib import Path

from tests.host_suites import UnreachableError, cached_source

VERSION = "1.9.0"
VARIABLE = "TRL_CHECKOUT"
ARCHIVE = f"https://github.com/huggingface/trl/archive/refs/tags/v{VERSION}.tar.gz"


def checkout() -> Path:
    """The folder that the environment names, or else a copy that is downloaded once.

    Returns:
        A folder with `trl/` and `tests/`.

    Raises:
        UnreachableError: if there is none.
        ValueError: if the named folder is of another version.
    """
    if named := os.environ.get(VARIABLE):
        found = (Path(named) / "VERSION").read_text(encoding="utf-8").strip()
        if found != VERSION:
            raise ValueError(f"{VARIABLE} names TRL {found}; check out v{VERSION}.")
        return Path(named)
    return cached_source(f"trl-{VERSION}", _download)


def _download(folder: Path) -> None:
    try:
        with (
            urllib.request.urlopen(ARCHIVE, timeout=30) as answer,
            tarfile.open(fileobj=answer, mode="r|gz") as archive,
        ):
            archive.extractall(folder, filter="data")
    except (urllib.error.URLError, TimeoutError) as error:
        raise UnreachableError(
            f"TRL's tests cannot be had from {ARCHIVE} ({error}); name a checkout of v{VERSION} "
            f"as {VARIABLE}."
        ) from error
