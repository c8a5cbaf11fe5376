"""The command on several nodes: workers and nodes are lost while it trains and while it caches."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from drive import Driver
from nodes import Nodes, apart
from record import record

SETTINGS = [
    "model={name: selfkd_mlp, args: {width: 16, depth: 1}}",
    "train={epochs: 400, batch_size: 64}",
    "search.trials=2",
    "rounds=1",
    "targets.shard_size=2",
    "confirm.seeds=0",
    "checkpoint.seconds=0.2",
]
TRAINS = "generation_{:03d}/trial_*/checkpoint.pt"
SHARDS = "targets/*/*/view_000/shard_*"
PATIENCE = 600.0


@pytest.fixture(scope="module")
def whole(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run that nothing disturbed, in one process without Ray."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert driver.run(folder, SETTINGS) == (0, "")
    return folder


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with apart():
        nodes = Nodes(cpus=1, gpus=0)
        yield nodes
        nodes.close()


class Command:
    """The command, on a cluster."""

    def __init__(self, here: Path, address: str, *arguments: str, **environment: str) -> None:
        self.run = here / "runs" / "run"
        self._log = here / "log"
        sets = [part for setting in SETTINGS for part in ("--set", setting)]
        command = [sys.executable, "-m", "selfkd.generations"]
        with self._log.open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *(arguments or ("--name", "run", *sets))],
                cwd=here,
                stdout=log,
                stderr=log,
                env={**os.environ, "RAY_ADDRESS": address, **environment},
            )

    def until(self, condition: Callable[[], object]) -> None:
        end = time.monotonic() + PATIENCE
        while not condition():
            assert self.process.poll() is None, self._log.read_text()
            assert time.monotonic() < end, self._log.read_text()
            time.sleep(0.02)

    def found(self, pattern: str) -> int:
        return len(list(self.run.glob(pattern)))

    def end(self, code: int = 0) -> str:
        assert self.process.wait(timeout=PATIENCE) == code, self._log.read_text()
        return self._log.read_text()


@pytest.mark.slow  # test_nodes loses a node in mid-trial, test_pool loses workers
def test_workers_and_nodes_are_lost_and_the_table_is_the_same(
    nodes: Nodes, whole: Path, tmp_path: Path
) -> None:
    """In one run, with a W&B host that accepts and never answers.

    The workers are killed in mid-trial, a node is lost while teacher logits are cached, the other
    in mid-trial; one that joins then does the rest.
    """
    first, second = nodes.have(2)
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        host = f"http://127.0.0.1:{mute.getsockname()[1]}"
        command = Command(tmp_path, nodes.address, WANDB_BASE_URL=host, WANDB_API_KEY="0" * 40)
        command.until(lambda: command.found(TRAINS.format(0)))
        for worker in [*nodes.workers(first), *nodes.workers(second)]:
            worker.kill()
        command.until(lambda: command.found(SHARDS) > 3)
        nodes.lose(first)
        cached = command.found(SHARDS)
        command.until(lambda: command.found(TRAINS.format(1)))
        nodes.lose(second)
        nodes.add()
        printed = command.end()
    assert cached < len(list(whole.glob(SHARDS)))
    assert record(command.run) == record(whole)
    assert "W&B: offline" in printed
    assert printed.count("a worker was lost in mid-train") >= 2
    assert "Traceback" not in printed
    assert command.found("wandb/offline-run-*-lineage")


@pytest.mark.slow  # test_killed_driver has it in one process, test_generations through the command
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_stopped_while_caching(
    nodes: Nodes, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    nodes.have(2)
    command = Command(tmp_path, nodes.address)
    command.until(lambda: command.found(SHARDS) > 3)
    command.process.send_signal(number)
    printed = command.end(130)
    assert command.found(SHARDS) < len(list(whole.glob(SHARDS)))
    assert f"--resume {command.run}" in printed
    assert "Traceback" not in printed
    kept = {path: path.stat().st_mtime_ns for path in command.run.glob(SHARDS)}
    again = Command(tmp_path, nodes.address, "--resume", str(command.run))
    again.end()
    assert record(command.run) == record(whole)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
