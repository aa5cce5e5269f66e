"""Files are there as a whole or not at all."""

import errno
import json
import os
import stat
from pathlib import Path

import pytest
from safetensors import SafetensorError

from peft_gradinit.errors import ExportError, OutputError
from peft_gradinit.files import check_writable, whole_file, whole_folder, write_json


def everything_in(folder: Path) -> list[str]:
    return sorted(p.name for p in folder.iterdir())


def write(path, text="new"):
    with whole_file(path) as beside:
        beside.write_text(text)


def test_a_file_is_written_with_its_folders_and_ordinary_permissions(tmp_path):
    write(tmp_path / "a" / "b" / "file.txt")
    assert (tmp_path / "a" / "b" / "file.txt").read_text() == "new"
    assert everything_in(tmp_path / "a" / "b") == ["file.txt"]
    (tmp_path / "plain").touch()
    modes = {stat.S_IMODE((tmp_path / p).stat().st_mode) for p in ("plain", "a/b/file.txt")}
    assert len(modes) == 1


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left"), OutputError, "the disk is full"),
        (OSError(errno.EROFS, "Read-only"), OutputError, "the file system is read-only"),
        (OSError(errno.EACCES, "Denied"), OutputError, "permission denied"),
        (SafetensorError("I/O error: x (os error 28)"), OutputError, "the disk is full"),
        (SafetensorError("I/O error: x (os error 27)"), OutputError, "larger than is allowed"),
        (SafetensorError("not about files"), SafetensorError, "not about files"),
        (RuntimeError("something else"), RuntimeError, "something else"),
        (ConnectionError("the Hub is away"), ConnectionError, "the Hub is away"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
def test_an_error_leaves_the_old_file(tmp_path, error, kind, message):
    write(tmp_path / "file.txt", "old")

    def fail():
        with whole_file(tmp_path / "file.txt") as beside:
            beside.write_text("half")
            raise error

    with pytest.raises(kind, match=message):
        fail()
    assert (tmp_path / "file.txt").read_text() == "old"
    assert everything_in(tmp_path) == ["file.txt"]


def write_folder(path, text="new", **options):
    with whole_folder(path, overwrite=True, is_ours={"file.txt"}.__contains__) as part:
        (part / "file.txt").write_text(text)
        if error := options.get("error"):
            raise error


@pytest.mark.parametrize(
    ("error", "kind", "message"),
    [
        (OSError(errno.ENOSPC, "No space left"), OutputError, "out': .*the disk is full"),
        (SafetensorError("I/O error: x (os error 28)"), OutputError, "out': .*the disk is full"),
        (ConnectionError("the Hub is away"), ConnectionError, "the Hub is away"),
        (KeyboardInterrupt(), KeyboardInterrupt, None),
    ],
)
@pytest.mark.parametrize("is_new", [True, False])
def test_an_error_leaves_the_old_folder(tmp_path, error, kind, message, is_new):
    if not is_new:
        write_folder(tmp_path / "out", "old")
    with pytest.raises(kind, match=message):
        write_folder(tmp_path / "out", error=error)
    assert everything_in(tmp_path) == ([] if is_new else ["out"])
    assert is_new or (tmp_path / "out" / "file.txt").read_text() == "old"


@pytest.mark.parametrize("failing", ["out", ".part"])
def test_a_rename_that_fails_leaves_the_old_folder_and_nothing_beside_it(
    tmp_path, monkeypatch, failing
):
    write_folder(tmp_path / "out", "old")
    rename = Path.rename

    def fail(self, target):
        if self.name.endswith(failing):
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(OutputError, match="busy"):
        write_folder(tmp_path / "out")
    assert (tmp_path / "out" / "file.txt").read_text() == "old"
    assert everything_in(tmp_path) == ["out"]


def test_a_file_that_appears_meanwhile_is_not_replaced(tmp_path):
    def interfered():
        with whole_folder(tmp_path / "out", overwrite=True, is_ours="file.txt".__eq__):
            (tmp_path / "out").mkdir()
            (tmp_path / "out" / "thesis.tex").write_text("mine")

    with pytest.raises(ExportError, match=r"thesis\.tex"):
        interfered()
    assert everything_in(tmp_path) == ["out"]


def test_json_is_replaced_as_a_whole(tmp_path):
    write_json(tmp_path / "a.json", {"b": "é", "a": 1})
    assert json.loads((tmp_path / "a.json").read_text(encoding="utf-8")) == {"b": "é", "a": 1}
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(tmp_path / "a.json", {"b": object()})
    assert everything_in(tmp_path) == ["a.json"]
    assert "é" in json.loads((tmp_path / "a.json").read_text(encoding="utf-8")).values()


def test_the_content_is_on_the_disk_before_the_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(
        Path, "replace", lambda self, to: (order.append("rename"), replace(self, to))[1]
    )
    write(tmp_path / "file.txt")
    assert order == ["fsync", "rename", "fsync"]


def test_places_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        check_writable(tmp_path / "file" / "below")
    with pytest.raises(OutputError, match="a part of the path is a file"):
        write(tmp_path / "file" / "below.txt")
    check_writable(tmp_path / "new" / "folder")
    assert everything_in(tmp_path) == ["file"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a read-only file system")
def test_read_only_file_systems():
    with pytest.raises(OutputError, match="/proc"):
        check_writable("/proc/folder")
    with pytest.raises(OutputError, match="/proc"):
        write("/proc/file.txt")
