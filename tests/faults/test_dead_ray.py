"""The command whose Ray dies: it ends, says what has died and how to go on, and leaves nothing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

SETTINGS = [
    *("model={name: selfkd_mlp, args: {width: 8}}", "train.epochs=100000", "search.trials=2"),
    *("checkpoint.seconds=0.1", "confirm.seeds=0", "tracking=none"),
]


@pytest.fixture
def short() -> Iterator[Path]:
    """A folder for Ray's sockets, whose paths are limited."""
    with tempfile.TemporaryDirectory(prefix="dr", dir="/tmp", ignore_cleanup_errors=True) as path:
        yield Path(path)


def runs(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False


@pytest.mark.parametrize(
    ("victim", "number", "code"),
    [
        ("raylet", signal.SIGKILL, 1),
        pytest.param("gcs_server", signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param("ray::DashboardAgent", signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param("ray::RuntimeEnvAgent", signal.SIGKILL, 1, marks=pytest.mark.slow),
        pytest.param(None, signal.SIGINT, 130, marks=pytest.mark.slow),
        pytest.param(None, signal.SIGTERM, 130, marks=pytest.mark.slow),
    ],
)
def test_a_run_whose_ray_dies_or_that_is_stopped(
    short: Path, tmp_path: Path, victim: str | None, number: signal.Signals, code: int
) -> None:
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    log = tmp_path / "log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "selfkd.generations", "--rounds", "0", "--name", "run"]
        process = subprocess.Popen(
            [*command, *sets],
            cwd=tmp_path,
            env={**os.environ, "RAY_TMPDIR": str(short), "TMPDIR": str(tmp_path)},
            stdout=file,
            stderr=file,
        )
    driver = psutil.Process(process.pid)
    while not list(tmp_path.glob("runs/run/generation_000/trial_*/checkpoint.pt")):
        assert process.poll() is None, log.read_text()
        time.sleep(0.05)
    ports = {
        connection.laddr.ip
        for one in [driver, *driver.children(recursive=True)]
        for connection in one.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert ports <= {"127.0.0.1", "::1", "::ffff:127.0.0.1"}
    family = driver.children(recursive=True)
    (chosen,) = [one for one in [driver, *family] if one.name() == victim] or [driver]
    chosen.send_signal(number)
    assert process.wait(timeout=600) == code, log.read_text()
    printed = log.read_text()
    assert "Traceback" not in printed
    assert "SIGTERM received" not in printed
    assert f"python -m selfkd.generations --resume {tmp_path}/runs/run" in printed
    if victim is None:
        assert printed.count("stopped; continue with") == 1
    else:
        server = "GCS server" if victim == "gcs_server" else "raylet"
        assert f"error: Ray's {server}, process" in printed
    while any(runs(one) for one in family):
        time.sleep(0.05)
    assert not list((short / "ray").glob("session_2*"))
    assert not (tmp_path / "runs" / "run" / "lock.json").exists()
