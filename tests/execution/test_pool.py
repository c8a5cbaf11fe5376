"""The pool on Ray: jobs, processes and failures."""

from __future__ import annotations

import math
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from selfkd.execution.jobs import Batch, EarlyStopping, Job, Outcome, run_one
from selfkd.execution.pool import Pool, Worker
from selfkd.execution.scheduler import MAX_FAILURES, JobSpec, PoolScheduler, RunningBatch

ENTRY = "pool_jobs:run_job"


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, log_to_driver=False, logging_level="CRITICAL", include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(cluster: None) -> Iterator[Pool]:
    with Pool(ENTRY, cpu=1, gpu=0, warm=2) as pool:
        yield pool


def jobs(count: int, kind: str = "train", **payload: Any) -> Batch:
    return Batch([Job(kind, {"name": f"job {n}", **payload}) for n in range(count)])


class Recorded(Batch):
    """A batch that collects the rows of each job."""

    def __init__(self, jobs: list[Job]) -> None:
        super().__init__(jobs)
        self.rows: dict[str, list[dict[str, Any]]] = {}

    def report(self, job: Job, rows: Any) -> None:
        self.rows.setdefault(job.payload["name"], []).extend(rows)


@ray.remote
class Holder:
    """Holds resources, as another run does."""


def test_waiting_for_other_runs_is_said_once(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first test, before the pool of this module has taken all CPUs."""
    monkeypatch.setattr("selfkd.execution.pool.BUSY_SECONDS", 1.0)
    other = Holder.options(num_cpus=2).remote()  # type: ignore[attr-defined]
    said: list[str] = []

    def say(text: str) -> None:
        said.append(text)
        ray.kill(other)

    batch = jobs(2)
    with Pool(ENTRY, cpu=1, gpu=0, warm=1, say=say) as pool:
        pool.run(batch)
    assert len(batch.outcomes) == 2
    assert said == ["no free resources: other runs hold the cluster; waiting for 1 CPU, 0 GPU"]


def test_closing_stops_what_runs(cluster: None) -> None:
    """As after Ctrl-C: leaving the pool while a long job runs does not wait for it.

    Before the pool of this module has taken all CPUs, too.
    """
    failure: list[BaseException] = []
    runs = threading.Event()

    class Watched(Batch):
        def report(self, job: Job, rows: Any) -> None:
            runs.set()

    def wait(pool: Pool) -> None:
        try:
            pool.run(Watched([Job("train", {"name": "long", "epochs": 10_000, "pause": 0.1})]))
        except RuntimeError as error:
            failure.append(error)

    with Pool(ENTRY, cpu=1, gpu=0, warm=1) as pool:
        waiter = threading.Thread(target=wait, args=(pool,))
        waiter.start()
        assert runs.wait(timeout=600)
    waiter.join(timeout=600)
    assert not waiter.is_alive()
    assert "stopped before the jobs were done" in str(failure[0])


@pytest.mark.parametrize(
    ("states", "is_said", "is_settled"),
    [
        (["NO_RESOURCES"], True, True),
        (["NO_RESOURCES", "FINISHED"], False, True),
        (["FINISHED"], False, True),
        (["SCHEDULING_STARTED", "NO_RESOURCES"], False, False),
        ([], False, False),
    ],
)
def test_only_a_pool_without_any_worker_waits(
    states: list[str], is_said: bool, is_settled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("selfkd.execution.pool._placement_states", lambda: states)
    said: list[str] = []
    pool = Pool(ENTRY, cpu=1, gpu=0, warm=1, say=said.append)
    pool._say_if_waiting(said.append)
    assert bool(said) is is_said
    assert (pool._say is None) is is_settled


def test_the_output_of_a_notebooks_cell_stays(
    cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tune's own reporter of a notebook clears it when it is made."""

    def display(*_: object) -> None:
        raise AssertionError

    names = SimpleNamespace(HTML=str, display=display, clear_output=display)
    monkeypatch.setitem(sys.modules, "IPython.display", names)
    monkeypatch.setitem(sys.modules, "IPython", SimpleNamespace(display=names))
    monkeypatch.setattr("ray.tune.progress_reporter.IS_NOTEBOOK", True)
    batch = jobs(1)
    with Pool(ENTRY, cpu=1, gpu=0, warm=1) as pool:
        pool.run(batch)
    assert len(batch.outcomes) == 1


def test_a_job_takes_an_idle_worker_rather_than_start_one(cluster: None, tmp_path: Path) -> None:
    """Though there is room for one more; two jobs at a time need two."""
    gate = tmp_path / "gate"

    class Meeting(Batch):
        def report(self, job: Job, rows: Any) -> None:
            meeting.update(row["pid"] for row in rows)
            if len(meeting) == 2:
                gate.touch()

    meeting: set[int] = set()
    processes: set[int] = set()
    with Pool(ENTRY, cpu=1, gpu=0, warm=1) as pool:
        for _ in range(6):
            batch = jobs(1)
            pool.run(batch)
            processes |= {outcome.row["pid"] for outcome in batch.outcomes}
        assert len(processes) == 1
        payload = {"gate": str(gate), "pause": 0.05}
        pool.run(Meeting([Job("train", {"name": name, **payload}) for name in "ab"]))


def test_all_jobs_run_once_and_end_with_their_last_row(pool: Pool) -> None:
    batch = jobs(7, epochs=3)
    pool.run(batch)
    assert sorted(o.job.payload["name"] for o in batch.outcomes) == [f"job {n}" for n in range(7)]
    assert all(o.row["epoch"] == 3 and o.error is None and not o.stopped for o in batch.outcomes)
    assert all(o.row["name"] == o.job.payload["name"] for o in batch.outcomes)


def test_every_row_is_reported_in_order(pool: Pool) -> None:
    batch = Recorded(
        [Job("train", {"name": f"job {n}", "epochs": 40, "pause": 0.03}) for n in (0, 1)]
    )
    pool.run(batch)
    for rows in batch.rows.values():
        assert [row["epoch"] for row in rows] == list(range(1, 41))


def test_workers_stay_warm_from_batch_to_batch(pool: Pool) -> None:
    """Between batches the same two processes stay, however long it takes."""
    processes: set[int] = set()
    deadline = time.monotonic() + 600
    while len(processes) < 2 and time.monotonic() < deadline:  # the second may still be starting
        batch = jobs(4, pause=0.2)
        pool.run(batch)
        processes |= {o.row["pid"] for o in batch.outcomes}
    for pause in (0.0, 0.5, 0.0):
        batch = jobs(4, pause=0.2)
        pool.run(batch)
        processes |= {o.row["pid"] for o in batch.outcomes}
        pool.run(jobs(1))  # a single job in between frees one worker and leaves the other warm
        time.sleep(pause)
    assert len(processes) == 2


def test_both_workers_work_at_the_same_time(pool: Pool) -> None:
    batch = jobs(2, epochs=4, pause=0.3)
    pool.run(batch)
    assert len({o.row["pid"] for o in batch.outcomes}) == 2


def test_a_job_that_raises_fails_alone_and_is_not_repeated(pool: Pool) -> None:
    batch = Recorded([Job("fail", {"name": "bad", "epochs": 3}), Job("train", {"name": "good"})])
    pool.run(batch)
    errors = {o.job.payload["name"]: o.error for o in batch.outcomes}
    assert errors == {"bad": "ValueError: bad fails", "good": None}
    assert [row["epoch"] for row in batch.rows["bad"]] == [1]


def test_run_one_raises_what_the_job_raised(pool: Pool) -> None:
    with pytest.raises(RuntimeError, match="ValueError: it fails"):
        run_one(pool, "fail", name="it", epochs=2)


def test_a_killed_worker_is_replaced_and_its_job_repeated(pool: Pool, tmp_path: Path) -> None:
    batch = Batch(
        [
            Job("die", {"name": "dies once", "died": str(tmp_path / "died"), "epochs": 2}),
            Job("train", {"name": "goes on", "epochs": 2}),
        ]
    )
    pool.run(batch)
    assert (tmp_path / "died").exists()
    assert {o.job.payload["name"]: o.error for o in batch.outcomes} == {
        "dies once": None,
        "goes on": None,
    }


def test_a_job_whose_storage_fails_is_repeated_and_one_that_lacks_a_file_is_not(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    batch = Recorded(
        [
            Job("away", {"name": "away", "died": str(tmp_path / "died"), "epochs": 2}),
            Job("lacks", {"name": "lacks", "epochs": 3}),
        ]
    )
    pool.run(batch)
    errors = {o.job.payload["name"]: o.error for o in batch.outcomes}
    assert errors == {"away": None, "lacks": "FileNotFoundError: lacks names no file"}
    assert [row["epoch"] for row in batch.rows["lacks"]] == [1]
    assert "OSError: [Errno 5] the storage is away in mid-away; its work is repeated" in caplog.text


@pytest.mark.slow  # three workers are started
def test_a_storage_that_stays_away_fails_the_job_in_the_end(pool: Pool, tmp_path: Path) -> None:
    batch = jobs(1, kind="away", died=str(tmp_path / "died"), always=True)
    pool.run(batch)
    (outcome,) = batch.outcomes
    assert outcome.error == "OSError: [Errno 5] the storage is away: 3 times in the same place"
    pool.run(jobs(2))  # and the pool is still there


def one_row(kind: str, payload: Any) -> Iterator[dict[str, Any]]:
    yield {"epoch": 1}


def test_a_worker_that_does_not_see_the_run_folder_fails(tmp_path: Path) -> None:
    """A node that joined late has not been checked before."""
    config = {"entry": f"{__name__}:one_row", "group": None, "report_seconds": 1.0}
    config |= {"job": JobSpec(Job("train", {})), "run": (str(tmp_path), "digits-1")}
    fault = f"OSError: storage must be a folder that every node sees, got {tmp_path}, which "
    for found in (None, "digits-2"):
        if found is not None:
            (tmp_path / "run_id").write_text(found)
        worker = Worker(config)
        assert worker.step()["fault"].startswith(fault)
        with pytest.raises(OSError, match="does not see"):
            worker.step()
    (tmp_path / "run_id").write_text("digits-1")
    assert Worker(config).step() == {"rows": [{"epoch": 1}], "done": True}


# keys that Ray Tune, or this package, reads in what a worker returns
KEYS = ("done", "error", "fault", "rows", "idle", "config", "trial_id", "should_checkpoint", "pid")


def named_rows(kind: str, payload: Any) -> Iterator[dict[str, Any]]:
    for epoch in (1, 2):
        yield {"epoch": epoch, **dict.fromkeys(KEYS, 1.0)}
    if kind == "fail":
        raise ValueError("x" * 5_000_000)


def test_metrics_may_have_the_names_of_tunes_own_keys() -> None:
    config = {"entry": f"{__name__}:named_rows", "group": None, "run": None}
    rows = [{"epoch": epoch, **dict.fromkeys(KEYS, 1.0)} for epoch in (1, 2)]
    for seconds, expected in ((60.0, [{"rows": rows, "done": True}]), (0.0, [{"rows": rows[:1]}])):
        own = {"job": JobSpec(Job("train", {})), "report_seconds": seconds}
        worker = Worker({**config, **own})
        assert [worker.step() for _ in expected] == expected
    worker = Worker({**config, "job": JobSpec(Job("fail", {})), "report_seconds": 60.0})
    result = worker.step()
    assert (result["rows"], result["done"]) == (rows, True)
    assert result["error"].startswith("ValueError: xxx")
    assert len(result["error"]) < 3000


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, None, "text"])
def test_asha_compares_finite_metrics_alone(value: Any) -> None:
    early = EarlyStopping(9, metric="done")
    batch = RunningBatch(jobs(1), early=early, limit=None, has_room=lambda running: True)
    assert batch.compared({"rows": [{"epoch": 2, "done": 0.5}]}) == {"epoch": 2, "value": 0.5}
    assert batch.compared({"rows": [{"epoch": 2, "done": value}], "done": True}) == {}
    assert batch.compared({"rows": []}) == {}


@pytest.mark.parametrize(
    ("rows", "error"),
    [
        (
            [{"fault": "OSError: the storage is away"}],
            "OSError: the storage is away: 3 times in the same place",
        ),
        (
            [{"fault": "OSError: the storage is away"}, {}],
            "its worker died 3 times in the same place",
        ),
        ([{"rows": [{"epoch": 1}]}, {"rows": [{"epoch": 1}]}], "its worker died 3 times"),
        ([{"rows": [{"epoch": 1}]}, {"rows": [{"epoch": 2}]}], None),  # it got further: repeated
    ],
)
def test_a_trial_that_fails_in_the_same_place_is_given_up(
    rows: list[dict[str, Any]], error: str | None
) -> None:
    scheduler = PoolScheduler(warm=1)
    scheduler.batch = RunningBatch(jobs(1), early=None, limit=None, has_room=lambda running: True)
    job = scheduler.batch.ask()
    assert job is not None
    scheduler.batch.running["a"] = job
    trial: Any = SimpleNamespace(trial_id="a", run_metadata=SimpleNamespace(num_failures=0))
    scheduler.live["a"] = trial
    for row in rows:
        if row is rows[-1]:
            trial.run_metadata.num_failures = MAX_FAILURES + 1  # as Tune counts them
        scheduler._report(trial, job, row)
    scheduler.give_up("a")
    outcomes = scheduler.batch.jobs.outcomes  # type: ignore[attr-defined]
    if error is None:
        assert (scheduler.batch.again, outcomes) == ([job], [])
    else:
        (outcome,) = outcomes
        assert outcome.error.startswith(error)


@pytest.mark.slow  # three workers are started; the words and the count are tested above
def test_a_job_that_kills_every_worker_fails_in_the_end(pool: Pool, tmp_path: Path) -> None:
    batch = jobs(1, kind="die", died=str(tmp_path / "died"), always=True)
    pool.run(batch)
    (outcome,) = batch.outcomes
    assert outcome.error is not None
    assert "its worker died 3 times" in outcome.error
    pool.run(jobs(2))  # and the pool is still there


def test_a_worker_that_dies_as_it_is_handed_over_costs_no_job(pool: Pool, tmp_path: Path) -> None:
    died = tmp_path / "died"
    first = [Job("trap", {"name": f"trap {n}", "died": str(died)}) for n in range(2)]
    batch = Batch([*first, *(Job("train", {"name": f"job {n}", "epochs": 2}) for n in range(4))])
    pool.run(batch)
    assert died.exists()
    assert len(batch.outcomes) == 6
    assert not [outcome for outcome in batch.outcomes if outcome.error]


def test_limit_bounds_how_many_run_together(pool: Pool) -> None:
    class Watched(Batch):
        running = most = 0

        def ask(self) -> Job | None:
            job = super().ask()
            if job is not None:
                self.running += 1
                self.most = max(self.most, self.running)
            return job

        def tell(self, outcome: Outcome) -> None:
            self.running -= 1
            super().tell(outcome)

    batch = Watched([Job("train", {"name": f"job {n}", "pause": 0.05}) for n in range(4)])
    pool.run(batch, limit=1)
    assert batch.most == 1
    assert len(batch.outcomes) == 4


def test_asha_stops_the_worse_trials_early(pool: Pool) -> None:
    batch = Recorded(
        [
            Job("train", {"name": f"job {n}", "epochs": 27, "pause": 0.01, "accuracy": accuracy})
            for n, accuracy in enumerate((0.9, 0.8, 0.5, 0.4, 0.3, 0.2))
        ]
    )
    pool.run(batch, early=EarlyStopping(27))
    ended = {o.job.payload["name"]: o for o in batch.outcomes}
    assert not ended["job 0"].stopped
    assert len(batch.rows["job 0"]) == 27
    assert all(ended[f"job {n}"].stopped for n in (3, 4, 5))
    assert len(batch.rows["job 5"]) < 27
    assert ended["job 5"].row == batch.rows["job 5"][-1]
    batch = jobs(2, epochs=27, accuracy=0.1)
    pool.run(batch, early=EarlyStopping(27))  # the next batch is not compared with this one
    assert not any(o.stopped for o in batch.outcomes)


def test_an_error_of_the_jobs_ends_the_batch(pool: Pool) -> None:
    class Broken(Batch):
        def tell(self, outcome: Outcome) -> None:
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space left on device"):
        pool.run(Broken([Job("train", {"name": "a"})]))
    pool.run(jobs(2))  # and the pool goes on
