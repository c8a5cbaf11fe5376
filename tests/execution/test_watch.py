"""The watch over Ray: what has died is named, and a call that hangs is left. Without Ray."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.exceptions import GetTimeoutError, RpcError

from selfkd.errors import ConfigError, RayLostError
from selfkd.execution import start, watch
from selfkd.execution.cluster import connect, open_message
from selfkd.execution.ray_private import sockets_fit, temporary_folder
from selfkd.execution.watch import Watch, check


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("LOOK_SECONDS", "ASK_SECONDS", "STUCK_SECONDS"):
        monkeypatch.setattr(watch, name, 0.05)


@pytest.fixture
def server() -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield process
    process.kill()
    process.communicate()


class Stuck:
    """What a process that hangs is called with."""

    def __init__(self) -> None:
        self.errors: list[RayLostError] = []
        self.called = threading.Event()

    def __call__(self, error: RayLostError) -> None:
        self.errors.append(error)
        self.called.set()


@pytest.mark.parametrize(("kind", "name"), [("raylet", "raylet"), ("gcs_server", "GCS server")])
def test_a_server_that_is_killed_is_named(
    server: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch, kind: str, name: str
) -> None:
    monkeypatch.setattr(watch, "started", lambda: {kind: [server], "log_monitor": []})
    stuck = Stuck()
    one = Watch(None, stuck)
    one.begin()
    check()
    server.kill()
    server.wait()
    with pytest.raises(RayLostError, match=f"Ray's {name}, process {server.pid} .* by signal 9"):
        check()
    assert stuck.called.wait(timeout=600)
    assert "where memory runs out" in str(stuck.errors[0])
    one.end()
    check()  # nothing is watched any more


def test_a_run_that_leaves_in_time_is_not_stuck(
    server: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watch, "STUCK_SECONDS", 600.0)
    monkeypatch.setattr(watch, "started", lambda: {"raylet": [server]})
    stuck = Stuck()
    one = Watch(None, stuck)
    one.begin()
    server.kill()
    server.wait()
    with pytest.raises(RayLostError):
        one.check()
    one.end()
    one._thread.join(timeout=600)
    assert not one._thread.is_alive()
    assert stuck.errors == []


def test_a_server_that_dies_while_ray_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    dead = iter([[], [("raylet", 123, 1)]])
    monkeypatch.setattr(watch, "dead_children", lambda: iter(next(dead, [])))
    stuck = Stuck()
    one = Watch(None, stuck)
    assert stuck.called.wait(timeout=600)
    one.end()
    for part in ("did not start on this machine: Ray's raylet", "exit code 1", "ulimit -n"):
        assert part in str(stuck.errors[0])


def test_a_ray_that_is_not_up_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watch, "START_SECONDS", 0.1)
    stuck = Stuck()
    one = Watch("head:6379", stuck)
    assert stuck.called.wait(timeout=600)
    one.end()
    assert "at head:6379 could not be joined: it is not up after 0.1 s" in str(stuck.errors[0])


def test_a_cluster_whose_head_is_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A port that refuses, and after longer one that does not answer; a node that is dead."""
    monkeypatch.setattr(watch, "REFUSED_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
        lives = True

        def ask(client: Any, timeout: float) -> bool:
            return lives

        monkeypatch.setattr(watch, "GcsClient", lambda address: None)
        monkeypatch.setattr(watch, "attached_node_lives", ask)
        monkeypatch.setattr(watch, "raylet_listens", lambda: False)
        one = Watch(address)
        one.begin()
        assert one._dead_cluster() is None
        lives = False
        assert "node of the Ray cluster" in str(one._dead_cluster())
        one.end()
    stuck = Stuck()
    one = Watch(address, stuck)
    one.begin()
    assert stuck.called.wait(timeout=600)
    one.end()
    assert f"the head of the Ray cluster at {address} has ended" in str(stuck.errors[0])
    monkeypatch.setenv("RAY_gcs_rpc_server_reconnect_timeout_s", "600")  # a head that comes back
    one = Watch(address)
    one._answered -= 100
    assert one._dead_cluster() is None
    one.end()


@pytest.mark.parametrize(
    "error",
    [
        Exception("The current node timed out\nduring startup."),
        RuntimeError("Failed to start GCS."),
        ValueError("Attempting to cap object store memory usage at 1 bytes"),
        ConnectionError(""),
        OSError(24, "Too many open files"),
    ],
)
def test_a_ray_that_does_not_start_is_one_message(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(**options: Any) -> None:
        raise error

    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(start.ray, "init", init)
    with pytest.raises(RayLostError) as failed, connect():
        pass
    assert " ".join(str(error).split()) in str(failed.value)
    assert "did not start on this machine" in str(failed.value)
    assert "RAY_TMPDIR" in str(failed.value)


@pytest.mark.parametrize(
    "error",
    [RpcError("Deadline\nExceeded", rpc_code=4), GetTimeoutError("late"), Exception("busy")],
)
def test_a_ray_that_does_not_respond_is_one_message(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a busy machine, right after its start; Ray itself would raise a traceback."""
    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(start.ray, "init", lambda **options: None)
    with pytest.raises(RayLostError) as failed, connect():
        raise error
    reason, way_out = str(failed.value).splitlines()
    assert reason.startswith(f"Ray does not respond as it should: {type(error).__name__}: ")
    assert way_out == "Continue when the machine is less busy"


@pytest.mark.parametrize(
    ("ray", "others", "folder"),
    [
        ("", None, "/tmp/ray"),
        ("", "/var/tmp", "/var/tmp/ray"),
        (None, "", "/tmp/ray"),
        ("here", None, "{cwd}/here/ray"),
        (None, "here", "{cwd}/here/ray"),
    ],
)
def test_an_empty_or_relative_folder_of_rays_is_none_of_the_working_folder(
    ray: str | None,
    others: str | None,
    folder: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    for name, value in (("RAY_TMPDIR", ray), ("TMPDIR", others)):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    assert str(temporary_folder()) == folder.format(cwd=tmp_path)


def test_a_full_disk_is_said_before_ray_waits_for_its_files(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(**_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(start.tempfile, "TemporaryFile", fail)
    folder = re.escape(str(temporary_folder()))
    told = rf"must be writable, got {folder} \(No space left on device\): set RAY_TMPDIR"
    before = set(temporary_folder().glob(f"session_*_{os.getpid()}"))
    with pytest.raises(ConfigError, match=told), connect():
        pass
    assert set(temporary_folder().glob(f"session_*_{os.getpid()}")) == before


@pytest.mark.parametrize("home", ["/dev/null/home", "new", "with a token"])
def test_a_token_is_there_where_ray_cannot_write_one(
    home: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    if home == "with a token":
        (tmp_path / home / ".ray").mkdir(parents=True)
        (tmp_path / home / ".ray" / "auth_token").write_text("its own")
    monkeypatch.setenv("HOME", str(tmp_path / home))
    monkeypatch.setenv("RAY_AUTH_TOKEN", "")  # which is put back at the end
    start._have_token()
    assert bool(os.environ["RAY_AUTH_TOKEN"]) == (home == "/dev/null/home")


def test_ray_listens_on_loopback_in_a_folder_that_its_sockets_fit_in(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    """A batch system's TMPDIR is too long: a short folder is used; a long RAY_TMPDIR is refused."""
    seen: dict[str, Any] = {}

    def init(**options: Any) -> None:
        ray_names = start.on_loopback.__wrapped__.__globals__
        missing = ray_names["utils"].get_dashboard_dependency_error()
        clusters = ray_names["ray_constants"].ENABLE_RAY_CLUSTER
        seen.update(options, clusters=clusters, waits_for_agent=missing is None)

    monkeypatch.setenv("RAY_ADDRESS", "local")
    monkeypatch.setattr(start.ray, "init", init)
    with connect():
        pass
    assert seen["clusters"] is seen["waits_for_agent"] is False
    with connect(verbose=True):
        assert seen["waits_for_agent"]
    assert seen["_temp_dir"] is seen["_plasma_directory"] is None
    with monkeypatch.context() as without:  # as in a container
        without.setattr(start, "_SHARED_MEMORY", Path("/dev/none"))
        with connect():
            assert os.path.isdir(seen["_plasma_directory"])
    short, long = os.environ["RAY_TMPDIR"], tmp_path / ("x" * 60)
    monkeypatch.delenv("RAY_TMPDIR")
    monkeypatch.setenv("TMPDIR", str(long))
    monkeypatch.setattr(start, "_SHORT", short)
    with connect():
        assert sockets_fit(start.Path(seen["_temp_dir"]))
        assert os.path.isdir(seen["_temp_dir"])
    assert not os.path.exists(seen["_temp_dir"])
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    with pytest.raises(ConfigError, match=f"RAY_TMPDIR must be short, .* got {long}"), connect():
        pass
    monkeypatch.setenv("RAY_TMPDIR", "/proc/none")
    with pytest.raises(ConfigError, match="must be writable, got /proc/none/ray"), connect():
        pass


def test_a_ray_without_a_token_is_warned_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    assert open_message(joined=True) is None
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    assert "whoever reaches the cluster's ports can run code" in str(open_message(joined=True))
    assert "any user of this machine can run code" in str(open_message(joined=False))
