"""Files that are there as a whole or not at all.

Everything is written beside its place, flushed to the disk, and renamed into it. A full disk, a
missing permission or a killed process leaves what was there before; the error says what to do.
"""

import errno
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import OutputError

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors, written in Rust, names what the system refused."""

_ADVICE = {
    errno.ENOSPC: "the disk is full; free some space or write elsewhere",
    errno.EDQUOT: "the disk quota is used up; free some space or write elsewhere",
    errno.EFBIG: "the file would be larger than is allowed here; write elsewhere",
    errno.EROFS: "the file system is read-only; write elsewhere",
    errno.EACCES: "permission denied; write elsewhere, or change the permissions",
    errno.EPERM: "not permitted; write elsewhere, or change the permissions",
    errno.ENOTDIR: "a part of the path is a file, not a folder",
    errno.EEXIST: "a part of the path is a file, not a folder",
    errno.EISDIR: "there is a folder of that name; give another name",
}


@contextmanager
def whole_file(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a path to write to, and put the file in its place when the block ends well.

    Args:
        path: where the file goes; missing folders are made, an old file is replaced.

    Yields:
        A path in the same folder, to be written.

    Raises:
        OutputError: if it cannot be written. What was at `path` is still there.
    """
    path = Path(path)
    beside = _beside(path)
    with _said_clearly(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield beside
            beside.chmod(_default_mode())  # safetensors makes files that only the owner can read
            _flush(beside)
            beside.replace(path)
            _flush(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that cannot be written to, before any work is done.

    Args:
        folder: where files will go; need not exist.

    Raises:
        OutputError: saying what is in the way.
    """
    folder = Path(folder)
    with _said_clearly(folder):
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not existing.is_dir():
            raise OutputError(
                f"cannot write to {str(folder)!r}: {str(existing)!r} is a file, not a folder; give "
                "another name."
            )
        with tempfile.TemporaryFile(dir=existing):
            pass


@contextmanager
def _said_clearly(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        if isinstance(error, SafetensorError) and not _OS_ERROR.search(str(error)):
            raise
        advice = _ADVICE.get(_number(error) or 0, "write elsewhere")
        raise OutputError(f"cannot write {str(path)!r}: {error}: {advice}.") from error


def _number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found.group(1)) if found else None


def _beside(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.part")


def _default_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _flush(path: Path) -> None:
    """Have a file or a folder's entries on the disk before anything refers to them."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)
