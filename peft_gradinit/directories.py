"""Directories that are written whole or not at all."""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import ExportError


@contextmanager
def written_whole(
    directory: str | os.PathLike[str], *, overwrite: bool, is_ours: Callable[[str], bool]
) -> Iterator[Path]:
    """Give a temporary directory beside the target, and put it in the target's place at the end.

    Everything is written to disk before the rename, so that a crash leaves the old state or the new
    one. After an error nothing has changed.

    Args:
        directory: the target; parents are made if missing.
        overwrite: replace a target that holds files already. It is replaced as a whole: files that
            are not written again are gone.
        is_ours: whether a file of that name may be replaced.

    Yields:
        The directory to write into.

    Raises:
        ExportError: if the target is a file, holds files and `overwrite` is off, or holds files
            that are not ours.
    """
    target = Path(os.path.abspath(directory))  # noqa: PTH100 `resolve` would follow a link
    _check_target(target, overwrite, is_ours)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".part"))
    try:
        yield part
        part.chmod(_default_mode())
        for path in [*part.rglob("*"), part]:
            _flush(path)
        _check_target(target, overwrite, is_ours)
        _replace(target, part)
    finally:
        shutil.rmtree(part, ignore_errors=True)
    _flush(target.parent)


def _check_target(target: Path, overwrite: bool, is_ours: Callable[[str], bool]) -> None:
    if not target.exists() and not target.is_symlink():
        return
    if target.is_symlink() or not target.is_dir():
        raise ExportError(
            f"{str(target)!r} is not a directory, and an export is one; pass another path."
        )
    names = sorted(path.name for path in target.iterdir())
    others = [name for name in names if not is_ours(name)]
    if others:
        raise ExportError(
            f"{str(target)!r} holds files that no export writes ({', '.join(others[:5])}), and would "
            "be replaced as a whole; pass an empty or new directory."
        )
    if names and not overwrite:
        raise ExportError(
            f"{str(target)!r} holds an export already ({', '.join(names[:5])}); pass another "
            "directory, or overwrite=True to replace it as a whole."
        )


def _replace(target: Path, part: Path) -> None:
    if not target.exists():
        part.rename(target)
        return
    old = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=".old"))
    target.rename(old)  # onto an empty directory
    try:
        part.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _default_mode() -> int:
    """What `mkdir` gives; `mkdtemp` makes directories that only the owner can read."""
    mask = os.umask(0)
    os.umask(mask)
    return 0o777 & ~mask


def _flush(path: Path) -> None:
    """Make sure that a file, or the names in a directory, are on disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows does not open directories
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
