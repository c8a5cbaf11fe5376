"""Joining a cluster, and the checks before a run, with real heads, nodes and autoscalers."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from ray.autoscaler._private.monitor import BASE_READONLY_CONFIG
from ray.cluster_utils import Cluster
from ray_head import ROOT, ray_head

import selfkd
from selfkd.errors import ConfigError
from selfkd.execution import cluster
from selfkd.execution.cluster import connect, find_slots

LIMIT = 600


def refused(monkeypatch: pytest.MonkeyPatch, address: str) -> str:
    """Return why an address is refused, before Ray is asked to join it, which takes minutes."""
    monkeypatch.setenv("RAY_ADDRESS", address)
    assert cluster.CONNECT_SECONDS + cluster.ANSWER_SECONDS < 10
    monkeypatch.setattr(cluster, "start", lambda *_, **__: pytest.fail("Ray was asked to join"))
    with pytest.raises(ConfigError) as error, connect():
        pass
    return str(error.value)


def test_an_unreachable_address(monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(monkeypatch, "127.0.0.1:1")
    assert re.search(r"RAY_ADDRESS must answer, got \S+:1: .*refused; is the cluster up", said)


def test_an_address_where_something_else_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cluster, "ANSWER_SECONDS", 2.0)
    with socket.create_server(("", 0)) as server:
        said = refused(monkeypatch, f"127.0.0.1:{server.getsockname()[1]}")
    assert "must be a Ray cluster" in said


@pytest.mark.parametrize("address", ["http://head:8265", "ray://head:10001"])
def test_an_address_of_another_kind(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    said = refused(monkeypatch, address)
    assert f"got {address}: from outside the cluster submit a job" in said


def test_an_unknown_host(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "RAY_ADDRESS must" in refused(monkeypatch, "nowhere.invalid:6379")


@pytest.fixture(scope="module")
def nodes() -> Iterator[Cluster]:
    """Two nodes on this machine; the second has a fake GPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "num_gpus": 0})
        made.add_node(num_cpus=2, num_gpus=1)
        patch.setenv("RAY_ADDRESS", made.address)
        yield made
        made.shutdown()


@pytest.fixture(scope="module")
def connected(nodes: Cluster) -> Iterator[None]:
    """This process, joined to the two nodes: once, as each time the nodes start new workers."""
    with connect() as was_there:
        assert was_there
        yield


@pytest.fixture
def joined(connected: None, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Messages to the user, while joined to the two nodes."""
    monkeypatch.setattr(cluster, "NODE_SECONDS", LIMIT)  # a loaded machine starts workers slowly
    return []


def slots(said: list[str], storage: Path, **needs: Any) -> int:
    return find_slots(storage=storage, joined=True, say=said.append, **needs)


def test_slots_are_counted_over_nodes_that_see_the_storage(
    joined: list[str], tmp_path: Path
) -> None:
    assert slots(joined, tmp_path, cpu=1, gpu=0) == 3
    assert slots(joined, tmp_path, cpu=0.5, gpu=0.5) == 2
    assert joined == []
    assert list(tmp_path.iterdir()) == []  # no marker is left


def test_what_no_node_has_is_refused_in_seconds(
    joined: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert cluster.LOOK_SECONDS < 8
    monkeypatch.setattr(cluster, "LOOK_SECONDS", 0.5)
    with pytest.raises(ConfigError) as error:
        slots(joined, tmp_path, cpu=1, gpu=2)
    for part in ("asked for 1 CPU and 2 GPU a trial", "has 2 CPU and 1 GPU", "resources.wait"):
        assert part in str(error.value)
    (said,) = joined
    assert re.fullmatch(r"waiting for a node with 1 CPU and 2 GPU: none has it yet \(\d s\)", said)


def test_a_node_that_joins_late_is_waited_for(
    joined: list[str], nodes: Cluster, tmp_path: Path
) -> None:
    started = []

    def say(text: str) -> None:
        joined.append(text)
        if not started:
            started.append(nodes.add_node(num_cpus=1, num_gpus=2))

    needs = {"cpu": 1.0, "gpu": 2.0}
    try:
        found = find_slots(**needs, storage=tmp_path, joined=True, wait=LIMIT, say=say)
    finally:
        for node in started:
            nodes.remove_node(node)
    assert found == 1


def test_a_storage_that_a_node_cannot_see(
    joined: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The marker does not exist when the nodes look for it."""
    monkeypatch.setattr(Path, "touch", lambda path: None)
    with pytest.raises(ConfigError) as error:
        slots(joined, tmp_path, cpu=1, gpu=0)
    said = str(error.value)
    assert f"every node sees and writes to, got {tmp_path}" in said
    assert said.count("cannot see it (No such file or directory)") == 2


def test_a_storage_that_hangs_on_a_node_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "STORAGE_SECONDS", 0.2)

    over = threading.Event()

    def hang(*_: object) -> None:
        over.wait()
        raise OSError("gone at last")

    monkeypatch.setattr(cluster, "open", hang, raising=False)
    fault, _ = cluster._look._function(str(tmp_path / "file"))
    over.set()
    assert fault == "has no answer from it within 0.2 s"


def test_an_unresponsive_node_does_not_delay_the_run(
    joined: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "NODE_SECONDS", 0.0)
    assert slots(joined, tmp_path, cpu=1, gpu=0) == 3
    assert "did not say within 0 s" in joined[0]


def test_nodes_of_another_version(
    joined: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other code is refused; another torch is reported, once."""
    ours, here = cluster._versions(), os.getpid()

    def differ(**versions: str) -> None:
        found = {**ours, **versions}
        monkeypatch.setattr(cluster, "_versions", lambda: found if os.getpid() == here else ours)

    differ(torch="1.0")
    assert slots(joined, tmp_path, cpu=1, gpu=0) == 3
    (said,) = joined
    assert "different versions of torch, 1.0 here and" in said
    differ(selfkd="00000000")
    with pytest.raises(ConfigError, match="the same selfkd, got 00000000 here and"):
        slots(joined, tmp_path, cpu=1, gpu=0)


def test_the_code_of_all_packages_is_compared() -> None:
    files = sorted(Path(selfkd.__file__).parent.rglob("*.py"))
    code = hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]
    assert cluster._versions()["selfkd"] == code


@pytest.mark.skipif(
    shutil.which("unshare") is None
    or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode != 0,
    reason="needs the right to make a mount namespace",
)
def test_a_node_with_a_folder_of_its_own_in_the_storages_place(
    joined: list[str], nodes: Cluster, tmp_path: Path
) -> None:
    """As on a cluster without a network folder: the path exists, the files do not."""
    temporary = tempfile.mkdtemp(prefix="rn", dir="/tmp")
    start = f"ray start --address={nodes.address} --num-cpus=1 --temp-dir={temporary} --block"
    start += " --dashboard-agent-listen-port=0 --metrics-export-port=0"
    node = subprocess.Popen(
        ["unshare", "-m", "sh", "-c", f"mount -t tmpfs tmpfs {tmp_path} && exec {start}"],
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        before = len(cluster._nodes())
        deadline = time.monotonic() + LIMIT
        while len(cluster._nodes()) == before:
            assert node.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.2)
        with pytest.raises(ConfigError) as error:
            slots(joined, tmp_path, cpu=1, gpu=0)
        assert str(error.value).count("cannot see it") == 1
    finally:
        node.terminate()
        node.wait(timeout=600)
        shutil.rmtree(temporary, ignore_errors=True)


@pytest.mark.slow  # an autoscaler takes 20 s to decide
def test_an_autoscaler_is_waited_for_no_longer_than_needed(tmp_path: Path) -> None:
    """Its GPU nodes do not exist yet; more GPUs than such a node has are refused."""
    kinds = {
        "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
        "gpu": {"resources": {"CPU": 2, "GPU": 1}, "node_config": {}, "max_workers": 1},
    }
    config = {**BASE_READONLY_CONFIG, "max_workers": 1, "available_node_types": kinds}
    config |= {"idle_timeout_minutes": 5}
    code = f"""
from pathlib import Path
from selfkd.execution.cluster import connect, find_slots
storage = Path({str(tmp_path)!r})
with connect() as joined:
    for gpu, wait in ((1, None), (3, 0)):
        try:
            found = find_slots(
                cpu=1, gpu=gpu, storage=storage, joined=joined, wait=wait, say=print
            )
            print("slots:", found)
        except ValueError as error:
            print("refused:", error)
"""
    with ray_head(tmp_path, cpus=1, autoscaling=config) as head:
        done = subprocess.run(
            [sys.executable, "-c", code],
            env=head.env(RAY_ADDRESS=head.gcs),
            capture_output=True,
            text=True,
            timeout=LIMIT,
        )
    assert done.returncode == 0, done.stderr
    assert "waiting for a node with 1 CPU and 1 GPU" in done.stdout
    assert "slots: 1" in done.stdout, done.stdout
    assert re.search(
        r"refused: .*3 GPU a trial, but the largest node has 2 CPU and 1 GPU", done.stdout
    )
