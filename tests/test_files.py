"""Files are there as a whole or not at all."""

import errno
import json
import os
import signal
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
from safetensors import SafetensorError

from peft_gradinit import files
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


@pytest.mark.parametrize("failing", ["out", "new"])
def test_a_rename_that_fails_leaves_the_old_folder_and_nothing_beside_it(
    tmp_path, monkeypatch, failing
):
    write_folder(tmp_path / "out", "old")
    rename = Path.rename

    def fail(self, target):
        if self.name == failing and (failing == "out" or not target.exists()):
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


def test_json_has_no_numbers_that_json_lacks(tmp_path):
    write_json(tmp_path / "a.json", {"a": [float("nan"), (float("inf"), 1.5)], "b": {"c": True}})
    text = (tmp_path / "a.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=pytest.fail) == {
        "a": [None, [None, 1.5]],
        "b": {"c": True},
    }


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


def test_temporary_names_cannot_be_foreseen_and_only_the_owner_can_reach_them(tmp_path):
    seen = set()
    for _ in range(3):
        with whole_file(tmp_path / "file.txt") as new:
            seen.add(new.parent.name)
            assert stat.S_IMODE(new.parent.stat().st_mode) == 0o700
            new.write_text("new")
    assert len(seen) == 3


def test_a_link_in_place_of_the_file_is_replaced_and_not_followed(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / "secret").chmod(0o600)
    (tmp_path / "file.txt").symlink_to(tmp_path / "secret")
    write(tmp_path / "file.txt")
    assert (tmp_path / "secret").read_text() == "secret"
    assert stat.S_IMODE((tmp_path / "secret").stat().st_mode) == 0o600
    assert not (tmp_path / "file.txt").is_symlink()


def test_threads_that_save_to_one_place_do_not_disturb_each_other(tmp_path):
    def save(i):
        for _ in range(20):
            write(tmp_path / "file.txt", str(i) * 1000)
            write_folder(tmp_path / "out", str(i) * 1000)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(save, range(4)))
    assert everything_in(tmp_path) == ["file.txt", "out"]
    for file in (tmp_path / "file.txt", tmp_path / "out" / "file.txt"):
        assert len(file.read_text()) == 1000
        assert len(set(file.read_text())) == 1


def killed_while(tmp_path, place):
    """A process that stops at `place` and is killed there; returns what it leaves."""
    pid = os.fork()
    if pid == 0:
        rename = Path.rename

        def stop(self, target):
            if place == "exchange" and self.name == "new" and not Path(target).exists():
                os.kill(os.getpid(), signal.SIGKILL)
            return rename(self, target)

        Path.rename = stop
        manager = whole_file if place == "file" else partial(write_folder, text="newer")
        if place == "file":
            saver = manager(tmp_path / "out")
            saver.__enter__()
        else:
            manager(tmp_path / "out")
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    return everything_in(tmp_path)


needs_locks = pytest.mark.skipif(files.fcntl is None, reason="needs locks")


@needs_locks
def test_what_killed_runs_leave_is_removed_by_the_next_save(tmp_path):
    left = killed_while(tmp_path, "file")
    assert len(left) == 1
    write(tmp_path / "other")
    assert everything_in(tmp_path) == [*left, "other"]
    write(tmp_path / "out")
    assert everything_in(tmp_path) == ["other", "out"]


@needs_locks
def test_a_kill_between_the_two_renames_loses_no_folder(tmp_path):
    write_folder(tmp_path / "out", "old")
    assert "out" not in killed_while(tmp_path, "exchange")
    with pytest.raises(KeyboardInterrupt):
        write_folder(tmp_path / "out", error=KeyboardInterrupt())
    assert everything_in(tmp_path) == ["out"]
    assert (tmp_path / "out" / "file.txt").read_text() == "old"


@needs_locks
def test_savers_that_are_alive_keep_their_work_folder(tmp_path, monkeypatch):
    with whole_file(tmp_path / "out") as new:
        new.write_text("slow")
        write(tmp_path / "out", "fast")
        os.utime(new.parent, (0, 0))  # an old one is no left-over either
        write(tmp_path / "out", "fast")
        assert new.exists()
    assert (tmp_path / "out").read_text() == "slow"


@needs_locks
@pytest.mark.parametrize("age", [0, 100_000])
@pytest.mark.parametrize("name", [".out.0123abcd.a1b2c3d4.part", ".out.a1b2c3d4.part"])
def test_work_folders_of_other_machines_and_versions_are_removed_after_a_day(tmp_path, age, name):
    (tmp_path / name).mkdir()
    os.utime(tmp_path / name, (time.time() - age,) * 2)
    write(tmp_path / "out")
    assert everything_in(tmp_path) == ["out"] if age else [name, "out"]


def test_without_locks_files_are_written_and_nothing_is_removed(tmp_path, monkeypatch):
    left = killed_while(tmp_path, "file")
    monkeypatch.setattr(files, "fcntl", None)
    write(tmp_path / "out")
    assert everything_in(tmp_path) == [*left, "out"]
