"""Writes files and folders as a whole or not at all.

Content goes into a work folder beside its place, is flushed to the disk, and is then renamed. A
full disk, a missing permission or a killed process leaves what was there before; the error says
what to do.

The work folder `.NAME.….part` has a random name, and only its owner can read it: nobody can foresee
it or put a link into it, and savers that run at the same time do not meet. The saver holds a lock
on it. The next save to the same place removes work folders without a saver, which killed runs
leave. Where the system has no such locks, they stay.
"""

import errno
import hashlib
import json
import math
import os
import platform
import re
import shutil
import stat
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from .errors import ExportError, OutputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_HOST = hashlib.sha256(platform.node().encode()).hexdigest()[:8]
"""Part of the names of this machine's work folders; its locks may be unknown to other machines."""

_ABANDONED_SECONDS = 86_400
"""Work folders of other machines, and of earlier versions, are left-overs after this time."""

_OCCUPIED = (errno.ENOTEMPTY, errno.EEXIST)

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
    with _errors_explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with _work_folder(path) as work:
            new = work / path.name
            yield new
            new.chmod(0o666 & ~_umask())  # safetensors makes files that only the owner can read
            _flush(new)
            new.replace(path)
            _flush(path.parent)


def write_json(path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
    """Write a JSON file with sorted keys, as a whole or not at all; what is not finite becomes null."""
    text = json.dumps(finite(content), indent=2, sort_keys=True, allow_nan=False)
    with whole_file(path) as beside:
        beside.write_text(text, encoding="utf-8")


def finite(value: Any) -> Any:
    """The value with `None` for every number that JSON does not have."""
    if isinstance(value, Mapping):
        return {k: finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [finite(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


@contextmanager
def whole_folder(
    folder: str | os.PathLike[str], *, overwrite: bool, is_ours: Callable[[str], bool]
) -> Iterator[Path]:
    """Yield an empty folder; rename it to `folder` when the block ends without an error.

    After an error nothing has changed. A folder cannot be exchanged in one step: if the process is
    killed between the two renames, `folder` is missing, and the old one lies in the work folder
    `.NAME.….part/old` beside it; the next call puts it back first. Of several calls at the same
    time the last one stays.

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
    with _errors_explained(target):
        _remove_left_overs(target)
    check_replaceable(target, overwrite, is_ours)
    with _errors_explained(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        with _work_folder(target) as work:
            new = work / "new"
            new.mkdir()
            yield new
            for path in [*new.rglob("*"), new]:
                _flush(path)
            check_replaceable(target, overwrite, is_ours)
            _put_in_place(new, target, lambda: check_replaceable(target, overwrite, is_ours))
            _flush(target.parent)


def check_is_file(path: str | os.PathLike[str]) -> None:
    """Refuse to open what is no ordinary file: a FIFO or a device may never end.

    Args:
        path: what is to be read; a missing file is left to the reader.

    Raises:
        OSError: if there is something else.
    """
    try:
        kind = Path(path).stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISREG(kind) and not stat.S_ISDIR(kind):
        raise OSError(f"{str(path)!r} is a FIFO, a device or a socket, not a file")


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


@contextmanager
def _work_folder(target: Path) -> Iterator[Path]:
    """A new folder beside `target` that is locked until the block ends, and then removed."""
    _remove_left_overs(target)
    folder, lock = _new_locked_folder(target)
    try:
        yield folder
    finally:
        _discard(folder, target)
        if lock is not None:
            os.close(lock)


def _new_locked_folder(target: Path) -> tuple[Path, int | None]:
    while True:
        prefix = f".{target.name}.{_HOST}."
        folder = Path(tempfile.mkdtemp(dir=target.parent, prefix=prefix, suffix=".part"))
        with suppress(FileNotFoundError):
            lock = _lock(folder, wait=True)
            if folder.exists():
                return folder, lock
            if lock is not None:
                os.close(lock)
        # Another saver took it for a left-over before it was locked.


def _lock(folder: Path, *, wait: bool) -> int | None:
    """Lock a folder until its handle is closed; `None` if it is locked already or cannot be."""
    if fcntl is None:
        return None
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        os.close(handle)
        return None
    return handle


def _remove_left_overs(target: Path) -> None:
    """Remove work folders of killed savers of `target`."""
    if fcntl is None or not target.parent.is_dir():
        return
    name = re.compile(
        rf"\.{re.escape(target.name)}\.(?:([0-9a-f]{{8}})\.)?[a-z0-9_]{{8}}\.(part|old)"
    )
    for folder in target.parent.iterdir():
        if not (found := name.fullmatch(folder.name)):
            continue
        with suppress(OSError):  # another saver removes it as well, or it is not ours
            if not _is_own_folder(folder, of_this_machine=found[1] == _HOST):
                continue
            if (lock := _lock(folder, wait=False)) is not None:
                _discard(folder, target)
                os.close(lock)


def _is_own_folder(folder: Path, *, of_this_machine: bool) -> bool:
    """Whether `tempfile` made a folder for this user, and its saver is known here or long gone."""
    facts = folder.lstat()
    private = stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.geteuid()
    return private and (of_this_machine or time.time() - facts.st_mtime > _ABANDONED_SECONDS)


def _discard(work: Path, target: Path) -> None:
    """Remove a work folder; an old folder in it goes back first if nothing is in its place."""
    old = work if work.suffix == ".old" else work / "old"
    if old.is_dir() and not target.exists() and (old != work or any(old.iterdir())):
        try:
            old.rename(target)
        except OSError:
            return  # it is the only one
    shutil.rmtree(work, ignore_errors=True)


def check_replaceable(target: Path, overwrite: bool, is_ours: Callable[[str], bool]) -> None:
    """Refuse a place that `whole_folder` would refuse (`ExportError`), before there is content."""
    try:
        kind = target.lstat().st_mode  # once, as another export may be replacing it
    except (FileNotFoundError, NotADirectoryError):
        return
    if not stat.S_ISDIR(kind):
        raise ExportError(
            f"{str(target)!r} is not a directory, and an export is one; pass another path."
        )
    try:
        names = sorted(path.name for path in target.iterdir())
    except FileNotFoundError:
        return  # another export is just replacing it
    others = [name for name in names if not is_ours(name)]
    if others:
        raise ExportError(
            f"{str(target)!r} holds files that no export writes ({', '.join(others[:5])}), and would "
            "be replaced as a whole; pass an empty or new directory."
        )
    if names and not overwrite:
        raise ExportError(
            f"{str(target)!r} holds an export already ({', '.join(names[:5])}); pass another "
            "directory, or overwrite=True (on the command line, --overwrite) to replace it as a "
            "whole."
        )


def _put_in_place(new: Path, target: Path, check: Callable[[], None]) -> None:
    """Rename a folder; one that is in the way is moved into the work folder if `check` allows."""
    old = new.with_name("old")
    while True:
        try:
            new.rename(target)  # also onto an empty folder
            return
        except OSError as error:
            if error.errno not in _OCCUPIED:
                raise
        check()
        shutil.rmtree(old, ignore_errors=True)
        with suppress(FileNotFoundError):  # another export was faster
            target.rename(old)


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
