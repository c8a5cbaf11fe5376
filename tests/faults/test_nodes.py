"""Nodes that are lost, come back or join late; GPUs that are shared. The GPUs are not real ones."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import pytest
from engine import Recorder, make_run
from nodes import Nodes, apart

from selfkd.config import load_config
from selfkd.execution.jobs import Batch, Job, Outcome
from selfkd.execution.pool import Pool
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import Row, TaskProgressed

ENTRY = "pool_jobs:run_job"
PATIENCE = 120.0


class Followed(Batch):
    """A batch in a thread of its own, that keeps every row."""

    def __init__(self, pool: Pool, jobs: Sequence[Job]) -> None:
        super().__init__(jobs)
        self.rows: list[Row] = []
        self._thread = threading.Thread(target=pool.run, args=(self,))
        self._thread.start()

    def report(self, job: Job, rows: Sequence[Row]) -> None:
        self.rows.extend(rows)

    def nodes(self) -> set[str]:
        return {row["node"] for row in self.rows}

    def gone(self) -> bool:
        """Whether all processes that it ran in have ended; they outlive their node a moment."""
        return not any(psutil.pid_exists(pid) for pid in {row["pid"] for row in self.rows})

    def last_node(self, name: str) -> str:
        return str([row["node"] for row in self.rows if row["name"] == name][-1])

    def wait(self) -> None:
        self._thread.join(timeout=PATIENCE)
        assert not self._thread.is_alive(), "the batch did not end"
        failures = [outcome.error for outcome in self.outcomes if outcome.error]
        assert not failures


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.05)


def train(count: int, **payload: Any) -> list[Job]:
    return [Job("train", {"name": f"job {number}", **payload}) for number in range(count)]


@pytest.fixture(scope="module")
def nodes() -> Iterator[Nodes]:
    with apart():
        nodes = Nodes()
        nodes.join()
        yield nodes
        nodes.close()


@pytest.fixture(scope="module")
def pool(nodes: Nodes) -> Iterator[Pool]:
    nodes.have(2)
    with Pool(ENTRY, cpu=1, gpu=1, warm=2) as pool:
        yield pool


def test_trials_at_half_a_gpu_share_a_card(nodes: Nodes, tmp_path: Path) -> None:
    """And the caching of logits runs in the same workers, on the same cards."""
    nodes.have(1)
    gate = tmp_path / "gate"
    with Pool(ENTRY, cpu=0.5, gpu=0.5, warm=2) as pool:
        batch = Followed(pool, train(2, epochs=4, pause=0.1, gate=str(gate)))
        until(lambda: len({row["pid"] for row in batch.rows}) == 2)
        gate.touch()
        batch.wait()
        caching = Followed(
            pool, [Job("cache_teacher_logits", {"name": f"shard {n}"}) for n in range(4)]
        )
        caching.wait()
    first, second = (outcome.row for outcome in batch.outcomes)
    assert first["pid"] != second["pid"]
    assert first["gpus"] == second["gpus"] == "0"
    assert max(first["time"][0], second["time"][0]) < min(first["time"][1], second["time"][1])
    assert {row["pid"] for row in caching.rows} <= {first["pid"], second["pid"]}
    assert {row["gpus"] for row in caching.rows} == {"0"}


def test_a_node_lost_in_mid_trial(nodes: Nodes, pool: Pool) -> None:
    """Its trial begins again elsewhere; the other node's is not disturbed."""
    names = nodes.have(2)
    batch = Followed(pool, train(2, epochs=25, pause=0.2))
    until(lambda: batch.nodes() == set(names))
    lost = batch.last_node("job 0")
    nodes.lose(lost)
    batch.wait()
    epochs = {
        name: [row["epoch"] for row in batch.rows if row["name"] == name]
        for name in ("job 0", "job 1")
    }
    assert epochs["job 1"] == list(range(1, 26))
    assert epochs["job 0"][-25:] == list(range(1, 26))
    assert len(epochs["job 0"]) > 25
    assert {outcome.row["node"] for outcome in batch.outcomes} == {*names} - {lost}


class Watched:
    """A pool, and what its workers ended with."""

    def __init__(self, pool: Pool) -> None:
        self._pool = pool
        self.rows: list[Row] = []

    def run(self, jobs: Any, **options: Any) -> None:
        tell = jobs.tell

        def watch(outcome: Outcome) -> None:
            self.rows.append(outcome.row)
            tell(outcome)

        jobs.tell = watch
        self._pool.run(jobs, **options)


@pytest.mark.slow  # test_lost_workers has it through the command
def test_a_node_lost_in_mid_caching(nodes: Nodes, pool: Pool, tmp_path: Path) -> None:
    """Every shard is written once, those of the lost node by another."""
    names = nodes.have(2)
    watched, events = Watched(pool), Recorder()
    run = make_run(load_config(), RunFolder(tmp_path), watched, events)
    payloads = [{"name": f"shard {n}", "epochs": 4, "pause": 0.25} for n in range(12)]
    rows: list[Row] = []
    thread = threading.Thread(
        target=lambda: rows.extend(run.jobs("caching", "cache_teacher_logits", payloads))
    )
    thread.start()
    until(lambda: {row["node"] for row in watched.rows} == set(names))
    nodes.lose(names[0])
    thread.join(timeout=PATIENCE)
    assert [row["name"] for row in rows] == [f"shard {n}" for n in range(12)]
    assert len(events.of(TaskProgressed)) == 12


@pytest.mark.slow  # test_lost_workers has it through the command
def test_a_node_that_joins_late_is_used(nodes: Nodes, pool: Pool) -> None:
    nodes.have(1)
    batch = Followed(pool, train(8, epochs=8, pause=0.25))
    until(lambda: len(batch.rows) > 0)
    late = nodes.add()
    batch.wait()
    assert len(batch.outcomes) == 8
    assert sum(outcome.row["node"] == late for outcome in batch.outcomes) >= 2


@pytest.mark.slow  # as the node above, but for how many are lost
def test_all_nodes_lost_and_one_back(nodes: Nodes, pool: Pool, tmp_path: Path) -> None:
    """Without a GPU anywhere the run waits, and goes on when there is one again."""
    names = nodes.have(2)
    gate = tmp_path / "gate"
    batch = Followed(pool, train(3, epochs=10, pause=0.05, gate=str(gate)))
    until(lambda: batch.nodes() == set(names))
    nodes.have(0)
    until(batch.gone)
    assert batch.outcomes == []
    gate.touch()
    back = nodes.add()
    batch.wait()
    assert [outcome.row["node"] for outcome in batch.outcomes] == [back] * 3


@pytest.mark.slow  # test_lost_workers loses a node in mid-trial
@pytest.mark.parametrize("losses", [2, 4])
def test_a_trial_outlives_its_nodes_as_long_as_it_gets_further(
    nodes: Nodes, pool: Pool, tmp_path: Path, losses: int
) -> None:
    """A retry is counted only where a worker died no later than one before it."""
    gate = tmp_path / "gate"
    (node,) = nodes.have(1)
    batch = Followed(pool, train(1, epochs=40 * losses, pause=0.02, gate=str(gate)))
    for reached in range(5, 30 * losses, 30):
        until(
            lambda node=node, reached=reached: any(
                row["node"] == node and row["epoch"] > reached for row in batch.rows
            )
        )
        nodes.lose(node)
        until(batch.gone)
        (node,) = nodes.have(1)
    gate.touch()
    batch.wait()
    epochs = [row["epoch"] for row in batch.rows]
    assert epochs[-40 * losses :] == list(range(1, 40 * losses + 1))
    assert epochs.count(1) >= 1 + losses  # more where a busy machine is taken for a lost node
