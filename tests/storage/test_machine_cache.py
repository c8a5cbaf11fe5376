import contextlib
import errno
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from selfkd.errors import ConfigError
from selfkd.storage import files, machine_cache
from selfkd.storage.machine_cache import cached_array, load_kept, save_kept

ROWS = np.arange(60, dtype=np.uint8).reshape(5, 3, 2, 2)
NAME = "0a" * 16


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("SELFKD_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("SELFKD_CACHE_GB", raising=False)
    return tmp_path / "cache" / machine_cache.FOLDER


class Maker:
    """Rows in two parts; counts how often they are made."""

    def __init__(self, rows: np.ndarray = ROWS) -> None:
        self.rows, self.made = rows, 0

    def __call__(self):
        self.made += 1
        yield self.rows[:2]
        yield self.rows[2:]


def of(name: str = NAME, make=None, **settings) -> np.ndarray | str:
    return cached_array(name, ROWS.shape, make or Maker(), **settings)


def test_array_is_made_once():
    make = Maker()
    for _ in range(3):
        assert np.array_equal(of(make=make), ROWS)
    assert make.made == 1
    assert np.array_equal(of("0b" * 16, Maker(ROWS + 1)), ROWS + 1)
    assert np.array_equal(of(make=make), ROWS)


def test_what_is_written_to_the_array_stays_with_its_owner():
    first = of()
    first[:] = 255
    assert np.array_equal(of(), ROWS)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: content + b"0",
        lambda content: content[:-1] + b"0",
        lambda content: b"{}".ljust(4096) + content[4096:],
        lambda content: b"\0" * 4096 + content[4096:],
        lambda content: content.replace(b"[5, 3", b"[3, 5"),
    ],
    ids=["empty", "cut off", "longer", "another pixel", "no facts", "no JSON", "another shape"],
)
def test_damaged_file_is_made_anew(cache, damage):
    of()
    (file,) = cache.glob("*.u8")
    file.write_bytes(damage(file.read_bytes()))
    make = Maker()
    assert np.array_equal(of(make=make), ROWS)
    assert make.made == 1
    assert np.array_equal(of(make=make), ROWS)
    assert make.made == 1


def _make_slowly(started, going, counter) -> None:
    def make():
        with counter.get_lock():
            counter.value += 1
        started.set()
        going.wait()
        yield ROWS

    assert np.array_equal(of(make=make), ROWS)


def test_one_process_makes_it_and_others_wait(monkeypatch):
    own = multiprocessing.get_context("fork")
    started, going, counter = own.Event(), own.Event(), own.Value("i", 0)
    waiting = own.Semaphore(0)
    monkeypatch.setattr(machine_cache.log, "warning", lambda *_: waiting.release())
    processes = [own.Process(target=_make_slowly, args=(started, going, counter)) for _ in range(3)]
    for process in processes:
        process.start()
    started.wait()
    for _ in processes[1:]:
        waiting.acquire()
    going.set()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert counter.value == 1


def test_nothing_is_kept_after_an_error_of_its_maker(cache):
    def broken():
        yield ROWS[:2]
        raise ValueError("no image")

    with pytest.raises(ValueError, match="no image"):
        of(make=broken)
    assert not [path for path in cache.iterdir() if not path.name.startswith("lock")]
    assert np.array_equal(of(), ROWS)


def test_nothing_is_kept_of_what_has_changed_meanwhile(cache):
    assert of(is_valid=lambda: False) == ""
    assert not list(cache.glob("*.u8"))


def test_full_disk_is_said(monkeypatch, cache):
    def full(path, write, patience):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr(machine_cache, "replace", full)
    assert "No space left on device" in of()


READ_ONLY = """
import subprocess, sys
import numpy as np
from selfkd.storage.machine_cache import cached_array
rows = np.arange(6, dtype=np.uint8).reshape(2, 3)
def of(name):
    found = cached_array(name * 32, rows.shape, lambda: [rows])
    return found if isinstance(found, str) else found.tolist()
disk = sys.argv[1]
subprocess.run(["mount", "-o", "mode=700", "-t", "tmpfs", "tmpfs", disk], check=True)
of("1")
subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
print(of("1"), of("2"), of("3"), sep="|")
"""


def test_a_disk_that_is_only_read(tmp_path, monkeypatch):
    """What is on it is used; why nothing more is kept is said in the same words of all."""
    if shutil.which("unshare") is None or os.geteuid() != 0:
        pytest.skip("needs root to mount")
    monkeypatch.setenv("SELFKD_CACHE", str(tmp_path / "cache"))
    (tmp_path / "cache").mkdir()
    command = ["unshare", "-m", sys.executable, "-c", READ_ONLY, str(tmp_path / "cache")]
    done = subprocess.run(command, capture_output=True, text=True)
    if "permission denied" in done.stderr.lower():
        pytest.skip(f"may not mount: {done.stderr.strip()}")
    why = f"Read-only file system: {tmp_path}/cache/images"
    assert done.stdout == f"[[0, 1, 2], [3, 4, 5]]|{why}|{why}\n", done.stderr


def test_folder_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SELFKD_CACHE", str(tmp_path / "file" / "cache"))
    assert "Not a directory" in of()


def test_folder_that_others_can_write_to_is_refused(cache):
    of()
    cache.chmod(0o777)
    assert "must be this user's alone to write to" in of()
    cache.chmod(0o700)
    cache.parent.chmod(0o770)
    assert "must be this user's alone to write to" in of()


def test_links_are_not_followed(cache, tmp_path):
    of()
    (file,) = cache.glob("*.u8")
    elsewhere = file.rename(tmp_path / "elsewhere")
    file.symlink_to(elsewhere)
    assert isinstance(of(), str)
    folder = cache.rename(tmp_path / "folder")
    cache.symlink_to(folder)
    assert "is a link or file" in of()


def test_limit(monkeypatch, cache):
    size = 4096 + ROWS.size
    monkeypatch.setenv("SELFKD_CACHE_GB", str(2.5 * size / 1e9))
    names = [digit * 32 for digit in "123"]
    for age, name in zip((30, 20), names, strict=False):
        of(name)
        past = time.time() - age
        os.utime(cache / f"{name}.u8", (past, past))
    of(names[0])  # used: now the other is the older
    of(names[2])
    assert sorted(file.stem for file in cache.glob("*.u8")) == [names[0], names[2]]


def test_file_in_use_is_not_removed(monkeypatch, cache):
    monkeypatch.setenv("SELFKD_CACHE_GB", str(1.5 * (4096 + ROWS.size) / 1e9))
    held = of("1" * 32)
    assert "has no room" in of("2" * 32)
    assert np.array_equal(held, ROWS)
    del held
    assert np.array_equal(of("2" * 32), ROWS)
    assert [file.stem for file in cache.glob("*.u8")] == ["2" * 32]


def test_limit_of_nothing_keeps_nothing(monkeypatch, cache):
    monkeypatch.setenv("SELFKD_CACHE_GB", "0")
    assert of() == ""
    save_kept(NAME, [1])
    assert load_kept(NAME) is None
    assert not cache.exists()


@pytest.mark.parametrize("given", ["many", "-1", "nan"])
def test_limit_that_is_no_number(monkeypatch, given):
    monkeypatch.setenv("SELFKD_CACHE_GB", given)
    with pytest.raises(ConfigError, match="SELFKD_CACHE_GB must be gigabytes, 0 or more, got"):
        of()


def test_what_a_killed_writer_left_is_removed(cache):
    of()
    left, new = (cache / f".{NAME}.u8.{digit * 16}" for digit in "ab")
    for file in (left, new):
        file.write_bytes(b"half")
    past = time.time() - 3600
    os.utime(left, (past, past))
    of("0c" * 16)
    assert not left.exists()
    assert new.exists()


def test_file_that_another_process_removes_meanwhile_is_no_fault(monkeypatch, cache):
    of()
    seen = machine_cache.is_temporary

    def remove_others(path):
        for file in cache.glob("*.u8"):
            file.unlink(missing_ok=True)
        return seen(path)

    (cache / "a").touch()  # two entries: one of them is gone when it is looked at
    names = sorted(os.listdir(cache), key=lambda name: name.endswith(".u8"))
    entries = {entry.name: entry for entry in os.scandir(cache)}
    listed = contextlib.nullcontext([entries[name] for name in names])
    monkeypatch.setattr(machine_cache, "is_temporary", remove_others)
    monkeypatch.setattr(machine_cache.os, "scandir", lambda _: listed)
    assert np.array_equal(of("0c" * 16), ROWS)


def test_empty_limit_is_none_given(monkeypatch):
    monkeypatch.setenv("SELFKD_CACHE_GB", "")
    assert np.array_equal(of(), ROWS)


def test_plain_data_are_kept(cache):
    assert load_kept(NAME) is None
    save_kept(NAME, {"paths": ["a", "\udce9"]})
    assert load_kept(NAME) == {"paths": ["a", "\udce9"]}
    (cache / f"{NAME}.json").write_text("[")
    assert load_kept(NAME) is None


def test_cache_folder_is_that_of_the_system(monkeypatch, tmp_path):
    monkeypatch.delenv("SELFKD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.cache_folder() == tmp_path / "xdg" / "selfkd"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.cache_folder() == tmp_path / ".cache" / "selfkd"
