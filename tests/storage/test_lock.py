"""One driver at a time in a run folder; dead drivers hold no lock."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from selfkd.cli.command import interruptible
from selfkd.errors import LockedError, RunError
from selfkd.storage import lock
from selfkd.storage.files import save_json
from selfkd.storage.lock import Lock

HOLD = "import sys, time; from pathlib import Path; from selfkd.storage.lock import Lock\n" \
    "with Lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"  # fmt: skip


def hold(folder: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_driver_is_refused_and_the_holder_is_named(tmp_path: Path) -> None:
    first = hold(tmp_path)
    try:
        with pytest.raises(LockedError, match=rf"another driver, process {first.pid} on .*: wait"):
            Lock(tmp_path).__enter__()
    finally:
        first.kill()
        first.wait()
    with Lock(tmp_path):  # the dead driver no longer holds it
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "lock.json").exists()


def test_a_reused_process_id_holds_no_lock(tmp_path: Path) -> None:
    with Lock(tmp_path):
        holder = json.loads((tmp_path / "lock.json").read_text())
    save_json(tmp_path / "lock.json", {**holder, "started": "1"})
    with Lock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["started"] == holder["started"]


@pytest.mark.parametrize("beats", [True, False])
@pytest.mark.parametrize("differs", ["host", "boot", "processes"])
def test_a_driver_of_another_machine_or_container(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, differs: str, beats: bool
) -> None:
    """Its process cannot be looked up here, whatever its id."""
    monkeypatch.setattr(lock, "STALE_SECONDS", 60.0 if beats else 1.0)
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.2)
    place = lock._location()
    if not beats:
        holder = {**place, differs: "elsewhere", "pid": 1, "started": "1", "token": "t", "beat": 3}
        save_json(tmp_path / "lock.json", holder)
        with Lock(tmp_path):
            return
    with Lock(tmp_path), monkeypatch.context() as patch:
        patch.setattr(lock, "_location", lambda: {**place, differs: "elsewhere"})
        patch.setattr(lock, "_started", lambda pid: None)
        with pytest.raises(LockedError, match="another driver"):
            Lock(tmp_path).__enter__()


def test_a_lock_without_boot_and_namespace_is_compared_by_host(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with Lock(tmp_path):
        holder = json.loads((tmp_path / "lock.json").read_text())
    old = {key: holder[key] for key in ("host", "pid", "started", "token", "beat")}
    save_json(tmp_path / "lock.json", {**old, "started": "1"})
    with Lock(tmp_path):
        assert "waiting" not in caplog.text
    save_json(tmp_path / "lock.json", old)
    with pytest.raises(LockedError, match="another driver"):
        Lock(tmp_path).__enter__()


def test_of_two_drivers_at_the_same_moment_one_wins(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other driver writes after this one has looked."""
    late = {"host": "b", "pid": 1, "started": "1", "token": "other", "beat": 0}
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: save_json(tmp_path / "lock.json", late))
    with pytest.raises(LockedError, match="at the same moment"):
        Lock(tmp_path).__enter__()


@pytest.mark.parametrize("handler", [signal.default_int_handler, signal.SIG_IGN])
def test_a_driver_that_loses_the_folder_stops(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, handler: Any
) -> None:
    """Also as a background job of a script, which ignores SIGINT."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    other = {"host": "b", "pid": 1, "started": "1", "token": "other", "beat": 0}
    held = Lock(tmp_path)

    def work() -> None:
        with held:
            for _ in range(300):  # a single long sleep would not be interrupted
                save_json(tmp_path / "lock.json", other)  # again: a heartbeat may have come between
                time.sleep(0.1)

    before = signal.signal(signal.SIGINT, handler)
    try:
        with interruptible(), pytest.raises(KeyboardInterrupt):
            work()
    finally:
        signal.signal(signal.SIGINT, before)
    assert held.lost
    assert json.loads((tmp_path / "lock.json").read_text())["token"] == "other"


HOLDER = {"host": "b", "pid": 1, "started": "1", "token": "other", "beat": 0}
DAMAGED = {
    "half": b'{"host": ',
    "empty": b"",
    "mapping": b"{}",
    "list": b"[1, 2]",
    "null": b"null",
    "text": b'"lock"',
    "number": b"1e999",
    "bytes": b"\xff\xfe\x00",
    "nested": b"[" * 200_000,
    "long": b'{"host": "' + b"a" * 1_000_000 + b'"}',
    "numbers": json.dumps({**HOLDER, "host": 1, "token": 2}).encode(),
    "no token": json.dumps({k: v for k, v in HOLDER.items() if k != "token"}).encode(),
    "huge pid": json.dumps({**HOLDER, "pid": 10**400}).encode(),
    "negative pid": json.dumps({**HOLDER, "pid": -1}).encode(),
    "pid of text": json.dumps({**HOLDER, "pid": "x"}).encode(),
    "beats of text": json.dumps({**HOLDER, "beat": "x"}).encode(),
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_lock_that_stays_is_taken(
    content: bytes,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(lock, "STALE_SECONDS", 0.1)
    (tmp_path / "lock.json").write_bytes(content)
    with Lock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()
    assert "lock.json is damaged: waiting" in caplog.text


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_lock_is_repaired_by_the_driver_at_work(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which it neither stops nor leaves without a heartbeat; another driver waits for it."""
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(lock, "STALE_SECONDS", 2.0)
    with Lock(tmp_path) as held:
        (tmp_path / "lock.json").write_bytes(content)
        with pytest.raises(LockedError, match="by another driver"):
            Lock(tmp_path).__enter__()
        assert held._thread.is_alive()
        assert not held.lost


@pytest.mark.parametrize("error", [OSError("full"), RecursionError("deep"), KeyError("a")])
def test_no_error_ends_the_heartbeats(
    error: Exception,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    raised = threading.Event()

    def fail(*_: object, **__: object) -> None:
        raised.set()
        raise error

    with Lock(tmp_path) as held:
        with monkeypatch.context() as patch:
            patch.setattr(lock, "_read", fail)
            assert raised.wait(60)
        (tmp_path / "lock.json").unlink(missing_ok=True)
        _wait_for(tmp_path / "lock.json")
        assert held._thread.is_alive()
    assert "lock.json: " in caplog.text


def test_a_removed_lock_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.01)
    (tmp_path / "run_id").write_text("run-1")
    with Lock(tmp_path) as held:
        for _ in range(3):
            (tmp_path / "lock.json").unlink(missing_ok=True)
            _wait_for(tmp_path / "lock.json")
        assert not held.lost
        assert not held.gone
    assert not (tmp_path / "lock.json").exists()


@pytest.mark.parametrize("how", ["removed", "moved", "replaced"])
def test_a_driver_whose_folder_is_gone_stops_and_makes_no_other(
    how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "BEAT_SECONDS", 0.05)
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run_id").write_text("run-1")

    def work() -> None:
        with Lock(folder):
            if how == "removed":
                shutil.rmtree(folder)
            else:
                folder.rename(tmp_path / "elsewhere")
            if how == "replaced":
                folder.mkdir()
                (folder / "run_id").write_text("run-2")
                (folder / "lock.json").write_text(json.dumps({}))
            time.sleep(60)  # which the interrupt ends

    with pytest.raises(RunError, match=f"{folder} was removed or moved while the run went on"):
        work()
    left = {path.name for path in folder.iterdir()} if folder.exists() else set()
    assert left == ({"run_id", "lock.json"} if how == "replaced" else set())


def test_any_error_of_a_run_whose_folder_is_gone_says_so(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "run_id").write_text("run-1")

    def work() -> None:
        with Lock(folder):
            shutil.rmtree(folder)
            (folder / "a").write_text("")

    with pytest.raises(RunError, match="was removed or moved"):
        work()


def _wait_for(path: Path) -> None:
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_the_command_refuses_a_locked_folder(tmp_path: Path) -> None:
    from selfkd.config import Config
    from selfkd.experiments.run_folder import RunFolder
    from selfkd.generations import main

    RunFolder.create(tmp_path / "run", Config())
    first = hold(tmp_path / "run")
    try:
        assert main(["--resume", str(tmp_path / "run")]) == 2
        assert (tmp_path / "run" / "config.yaml").exists()
    finally:
        first.send_signal(signal.SIGKILL)
        first.wait()
