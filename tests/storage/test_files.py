"""Atomic files: the old content, the new content, or no file; never a part."""

import errno
import json
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from selfkd.errors import ConfigError
from selfkd.storage import files
from selfkd.storage.files import load_json, replace, retry_io, save_json, save_text


def test_a_file_and_its_folder_are_made(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    save_text(path, "text\n")
    assert path.read_text() == "text\n"
    save_text(path, "other")
    assert path.read_text() == "other"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt(), SystemExit(1)])
@pytest.mark.parametrize("old", ["old", None])
def test_a_write_that_fails_changes_nothing(tmp_path, old, error):
    path = tmp_path / "file.txt"
    if old is not None:
        path.write_text(old)

    def write(temporary):
        Path(temporary).write_text("half")
        raise error

    with pytest.raises(type(error)):
        replace(path, write)
    assert os.listdir(tmp_path) == (["file.txt"] if old else [])
    assert not old or path.read_text() == old


def test_nothing_is_visible_before_the_write_is_complete(tmp_path):
    path = tmp_path / "file.txt"
    seen = []

    def write(temporary):
        with open(temporary, "w") as file:
            file.write("ne")
            file.flush()
            seen.append(path.exists() and path.read_text())
            file.write("w")

    replace(path, write)
    save_text(path, "old")
    replace(path, write)
    assert seen == [False, "old"]
    assert path.read_text() == "new"


def test_the_content_is_on_disk_before_the_file_is_renamed(tmp_path, monkeypatch):
    done = []
    fsync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: done.append("flushed") or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda *args: done.append("renamed") or rename(*args))
    save_text(tmp_path / "file.txt", "text")
    assert done == ["flushed", "renamed"]


def test_writers_at_the_same_time_do_not_mix(tmp_path):
    path = tmp_path / "file.txt"

    def write(temporary):
        with open(temporary, "w") as file:
            file.write("one")
            file.flush()
            save_text(path, "another")
            assert path.read_text() == "another"
            file.write(" two")

    replace(path, write)
    assert path.read_text() == "one two"
    assert os.listdir(tmp_path) == ["file.txt"]


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_others_may_read_what_the_umask_allows(tmp_path, mask):
    before = os.umask(mask)
    try:
        save_json(tmp_path / "file.json", 1)
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file.json").stat().st_mode) == 0o666 & ~mask


def test_json_there_and_back(tmp_path):
    value = {"a": [1, 2.5, None, True], "ä": {"b": "c"}}
    save_json(tmp_path / "file.json", value)
    assert load_json(tmp_path / "file.json") == value
    with pytest.raises(TypeError):
        save_json(tmp_path / "file.json", {"a": object()})
    assert load_json(tmp_path / "file.json") == value


@pytest.mark.parametrize("content", [b"", b'{"a": 1', b"\xff\xfe", b"{'a': 1}"])
def test_damaged_json_is_named(tmp_path, content):
    path = tmp_path / "result.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"result\.json is damaged .*: remove it and resume"):
        load_json(path)


def test_a_missing_json_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"result\.json"):
        load_json(tmp_path / "result.json")


def test_json_is_readable_by_others(tmp_path):
    save_json(tmp_path / "file.json", {"accuracy": 0.5})
    assert json.loads((tmp_path / "file.json").read_text()) == {"accuracy": 0.5}
    assert (tmp_path / "file.json").read_text().endswith("}\n")


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EDQUOT, errno.ESTALE])
def test_transient_errors_are_retried_with_one_warning(tmp_path, monkeypatch, caplog, number):
    failures = [OSError(number, os.strerror(number))] * 2
    rename = os.replace
    monkeypatch.setattr(
        os, "replace", lambda *paths: _raise(failures.pop()) if failures else rename(*paths)
    )
    save_text(tmp_path / "a", "text")
    assert (tmp_path / "a").read_text() == "text"
    assert os.listdir(tmp_path) == ["a"]
    assert [record.message for record in caplog.records] == [
        f"{tmp_path / 'a'}: [Errno {number}] {os.strerror(number)}: trying again for "
        f"{files.PATIENCE:.0f} s"
    ]


@pytest.mark.parametrize(
    ("number", "patience"), [(errno.EACCES, 60), (errno.EISDIR, 60), (errno.ENOSPC, 0)]
)
def test_permanent_errors_and_an_exhausted_patience_are_raised_at_once(tmp_path, number, patience):
    calls = []

    def work():
        calls.append(1)
        raise OSError(number, "no")

    with pytest.raises(OSError, match="no"):
        retry_io(tmp_path, work, patience=patience)
    assert calls == [1]


def test_pauses_double_to_five_seconds_within_the_patience(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    monkeypatch.setattr(time, "monotonic", lambda: sum(pauses))

    def work():
        raise OSError(errno.ENOSPC, "full")

    with pytest.raises(OSError, match="full"):
        retry_io(tmp_path, work, patience=20)
    assert pauses == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0])


FULL = """
(disk / "filler").write_bytes(bytes(2**20 - 8192))
mend = (disk / "filler").unlink
"""
READ_ONLY = """
mount("-o", "remount,ro")
mend = lambda: mount("-o", "remount,rw")
"""


@pytest.mark.parametrize("fault", [FULL, READ_ONLY], ids=["full", "read-only"])
def test_a_disk_that_fails_for_a_while(tmp_path, fault):
    """A real disk of one MiB, mounted in a namespace of its own."""
    script = f"""
import os, subprocess, sys, threading
from pathlib import Path
from selfkd.storage.files import save_text
disk = Path(sys.argv[1])
def mount(*options):
    subprocess.run(["mount", *options, "-t", "tmpfs", "tmpfs", str(disk)], check=True)
mount("-o", "size=1m")
{fault}
threading.Timer(1.5, mend).start()
save_text(disk / "row", "x" * 50_000, patience=60)
print(len((disk / "row").read_text()), sorted(os.listdir(disk)))
"""
    command = ["unshare", "-m", sys.executable, "-c", script, str(tmp_path)]
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("needs root to mount")
    done = subprocess.run(command, capture_output=True, text=True)
    if "permission denied" in done.stderr.lower():
        pytest.skip(f"may not mount: {done.stderr.strip()}")
    assert done.stdout == "50000 ['row']\n", done.stderr


def _raise(error):
    raise error


@pytest.mark.parametrize("value", ["", "abc", "-1", "nan", "inf", "1e400"])
def test_a_patience_that_is_no_time_is_said_at_the_first_file(tmp_path, monkeypatch, value):
    (tmp_path / "old").write_text("[1]")
    monkeypatch.setenv("SELFKD_PATIENCE", value)
    monkeypatch.setattr(files, "PATIENCE", files._seconds(value))
    with pytest.raises(ConfigError, match=f"SELFKD_PATIENCE must be .*, got '{value}'"):
        save_text(tmp_path / "new", "text")
    assert load_json(tmp_path / "old") == [1]  # what only reads goes on
    assert os.listdir(tmp_path) == ["old"]


def test_a_patience_is_seconds():
    assert [files._seconds(text) for text in ("0", " 5 ", "1e3")] == [0, 5, 1000]


def test_a_run_folder_that_was_removed_is_not_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "_run_folders", [])
    run = tmp_path / "run"
    save_text(run / "run_id", "a")
    files.make_no_folder_again(run)
    save_text(run / "trial" / "row", "x")
    shutil.rmtree(run)
    with pytest.raises(FileNotFoundError, match="the run folder was removed or moved") as error:
        save_text(run / "trial" / "row", "x")
    assert error.value.filename == str(run)
    assert not run.exists()
    save_text(tmp_path / "other" / "row", "x")
