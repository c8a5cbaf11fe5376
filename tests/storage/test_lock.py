"""One driver at a time in a run folder; dead drivers hold no lock."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from selfkd.cli.command import interruptible
from selfkd.errors import LockedError
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


def test_a_damaged_lock_is_ignored(tmp_path: Path) -> None:
    (tmp_path / "lock.json").write_text('{"host": ')
    with Lock(tmp_path):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


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
