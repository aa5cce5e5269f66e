"""Writes files and folders as a whole or not at all.

Content goes to a temporary name beside its place, is flushed to the disk, and is then renamed. A
full disk, a missing permission or a killed process leaves what was there before; the error says
what to do.
"""

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import ExportError, OutputError

_OS_ERROR = re.compile(r"\(os error (\d+)\)")
"""How safetensors, written in Rust, reports an error of the system."""

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
    """Yield a temporary path; rename it to `path` when the block ends without an error.

    Missing folders are made. An old file is replaced; after an error (`OutputError` if the path
    cannot be written) it is still there.
    """
    path = Path(path)
    beside = path.with_name(f".{path.name}.{os.getpid()}.part")
    with _errors_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            yield beside
            beside.chmod(0o666 & ~_umask())  # safetensors makes files that only the owner can read
            _flush(beside)
            beside.replace(path)
            _flush(path.parent)
        finally:
            beside.unlink(missing_ok=True)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a JSON file with sorted keys, as a whole or not at all."""
    with whole_file(path) as beside:
        beside.write_text(json.dumps(content, indent=2, sort_keys=True), encoding="utf-8")


@contextmanager
def whole_folder(
    folder: str | os.PathLike[str], *, overwrite: bool, is_ours: Callable[[str], bool]
) -> Iterator[Path]:
    """Yield an empty folder; rename it to `folder` when the block ends without an error.

    After an error nothing has changed. A folder cannot be exchanged in one step: if the process is
    killed between the two renames, `folder` is missing, and the old one lies beside it under a name
    that ends in `.old`.

    Args:
        folder: where the folder goes; missing parents are made.
        overwrite: replace a folder that holds files already. It is replaced as a whole: files that
            are not written again are gone.
        is_ours: whether a file of that name may be replaced.

    Raises:
        ExportError: if the place is a file, holds files and `overwrite` is off, or holds files
            that are not ours.
        OutputError: if it cannot be written.
    """
    target = Path(os.path.abspath(folder))  # noqa: PTH100 `resolve` would follow a link
    _check_replaceable(target, overwrite, is_ours)
    with _errors_explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        part = _empty_folder_beside(target, ".part")
        try:
            yield part
            part.chmod(0o777 & ~_umask())  # made so that only the owner can read it
            for path in [*part.rglob("*"), part]:
                _flush(path)
            _check_replaceable(target, overwrite, is_ours)
            _replace_folder(target, part)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        _flush(target.parent)


def check_writable(folder: str | os.PathLike[str]) -> None:
    """Refuse a folder that cannot be written to (`OutputError`); it need not exist yet."""
    folder = Path(folder)
    with _errors_explained(folder):
        existing = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if not existing.is_dir():
            raise OutputError(
                f"cannot write to {str(folder)!r}: {str(existing)!r} is a file, not a folder; give "
                "another name."
            )
        with tempfile.TemporaryFile(dir=existing):
            pass


@contextmanager
def _errors_explained(path: Path) -> Iterator[None]:
    try:
        yield
    except OutputError:
        raise
    except (OSError, SafetensorError) as error:
        if (number := _number(error)) is None:
            raise  # not the system's: the Hub's errors, say, are `OSError`s as well
        advice = _ADVICE.get(number, "write elsewhere")
        raise OutputError(f"cannot write {str(path)!r}: {error}: {advice}.") from error


def _number(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    found = _OS_ERROR.search(str(error))
    return int(found.group(1)) if found else None


def _empty_folder_beside(target: Path, ending: str) -> Path:
    return Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.", suffix=ending))


def _check_replaceable(target: Path, overwrite: bool, is_ours: Callable[[str], bool]) -> None:
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


def _replace_folder(target: Path, part: Path) -> None:
    if not target.exists():
        part.rename(target)
        return
    old = _empty_folder_beside(target, ".old")
    try:
        target.rename(old)  # onto an empty folder
    except BaseException:
        old.rmdir()
        raise
    try:
        part.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _flush(path: Path) -> None:
    """Make the system write a file, or the entries of a folder, to the disk now."""
    if path.is_dir() and os.name == "nt":
        return  # folders cannot be opened there
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        with suppress(OSError) if path.is_dir() else nullcontext():
            os.fsync(handle)
    finally:
        os.close(handle)
