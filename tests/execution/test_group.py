"""Several workers that train one student: Ray Train within the pool's trials."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from train_jobs import PLAIN, born_again, payload

from selfkd.execution.jobs import Batch, EarlyStopping, Job
from selfkd.execution.pool import Pool
from selfkd.results import Row
from selfkd.worker.jobs import run_job

USERS = """
import torch
import torch.distributed as dist

def train_fn(trial):
    for epoch in (1, 2):
        total = torch.tensor(float(dist.get_rank()))
        dist.all_reduce(total)
        if trial.ranks.first:
            model = torch.nn.Linear(1, 1)
            trial.report({"val_accuracy": total.item()}, student=model, checkpoint={"epoch": epoch})
"""


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=4, log_to_driver=False, logging_level="CRITICAL", include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(cluster: None) -> Iterator[Pool]:
    with Pool("rank_jobs:run_job", cpu=1, gpu=0, warm=2, workers=2) as pool:
        yield pool


class Recorded(Batch):
    """A batch that collects the rows of each job."""

    def __init__(self, jobs: list[Job]) -> None:
        super().__init__(jobs)
        self.rows: dict[str, list[Row]] = {}

    def report(self, job: Job, rows: Any) -> None:
        self.rows.setdefault(job.payload.get("name", ""), []).extend(rows)


def test_training_runs_on_groups_whose_rank_0_reports(pool: Pool) -> None:
    """Two at a time: one ends, and of the other a rank fails, which is not repeated."""
    batch = Recorded(
        [
            Job("train", {"name": "a", "epochs": 3}),
            Job("train", {"name": "b", "epochs": 3, "fails": 1}),
        ]
    )
    pool.run(batch)
    errors = {outcome.job.payload["name"]: outcome.error for outcome in batch.outcomes}
    assert errors == {"a": None, "b": "ValueError: rank 1 fails"}
    assert [row["epoch"] for row in batch.rows["a"]] == [1, 2, 3]
    assert [row["epoch"] for row in batch.rows["b"]] == [1]
    for rows in batch.rows.values():
        assert {(row["rank"], row["size"], row["sum"]) for row in rows} == {(0, 2, 3.0)}


def test_other_jobs_get_one_warm_worker(pool: Pool) -> None:
    batch = Recorded([Job("evaluate", {"name": str(n), "epochs": 2}) for n in range(8)])
    pool.run(batch)
    rows = [row for job in batch.rows.values() for row in job]
    assert [row["size"] for row in rows] == [1] * 16
    assert len({row["pid"] for row in rows}) < 8


def test_an_error_fails_a_job_of_one_worker(pool: Pool) -> None:
    batch = Recorded([Job("evaluate", {"name": "a", "epochs": 3, "fails": 0})])
    pool.run(batch)
    assert [outcome.error for outcome in batch.outcomes] == ["ValueError: rank 0 fails"]


@pytest.mark.slow  # a job whose storage fails is repeated below; a worker that dies, in test_pool
@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_whose_rank_dies_is_repeated(pool: Pool, tmp_path: Path, rank: int) -> None:
    job = {"name": "a", "epochs": 3, "dies": rank, "died": str(tmp_path / "died")}
    batch = Recorded([Job("train", job)])
    pool.run(batch)
    assert (tmp_path / "died").exists()
    assert [(outcome.error, outcome.row["epoch"]) for outcome in batch.outcomes] == [(None, 3)]


@pytest.mark.parametrize("kind", ["evaluate", pytest.param("train", marks=pytest.mark.slow)])
def test_a_job_whose_storage_fails_is_repeated(
    pool: Pool, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: str
) -> None:
    job = {"name": "a", "epochs": 3, "away": 0, "died": str(tmp_path / "died")}
    batch = Recorded([Job(kind, job)])
    pool.run(batch)
    assert [(outcome.error, outcome.row["epoch"]) for outcome in batch.outcomes] == [(None, 3)]
    assert f"OSError: [Errno 5] the storage is away in mid-{kind}" in caplog.text


@pytest.mark.slow
def test_stopping_a_trial_ends_its_group(pool: Pool, tmp_path: Path) -> None:
    """The workers are released: all four CPUs are available again."""
    jobs = [
        {"name": "good", "epochs": 60, "accuracy": 0.9},
        {"name": "bad", "epochs": 60, "accuracy": 0.1, "pause": 0.3},
    ]
    batch = Recorded([Job("train", {**job, "trace": str(tmp_path / job["name"])}) for job in jobs])
    pool.run(batch, early=EarlyStopping(60), limit=1)  # so that one can be worse
    assert [outcome.stopped for outcome in batch.outcomes] == [False, True]
    deadline = time.monotonic() + 600
    while ray.available_resources().get("CPU", 0) < 4:
        assert time.monotonic() < deadline, ray.available_resources()
        time.sleep(0.2)
    reached = [int((tmp_path / f"bad.{rank}").read_text()) for rank in (0, 1)]
    assert max(reached) < 60


@pytest.fixture(scope="module")
def training(cluster: None) -> Iterator[Pool]:
    with Pool("selfkd.worker.jobs:run_job", cpu=1, gpu=0, warm=1, workers=2) as pool:
        yield pool


def trained(pool: Pool, job: dict[str, Any]) -> list[Row]:
    batch = Recorded([Job("train", job)])
    pool.run(batch)
    assert [outcome.error for outcome in batch.outcomes] == [None]
    (rows,) = batch.rows.values()
    return rows


@pytest.mark.slow  # what `test_three_train_as_one` has, on workers of Ray
@pytest.mark.parametrize("case", ["distilled", "labels"])
def test_the_loss_curve_is_that_of_one_worker(training: Pool, tmp_path: Path, case: str) -> None:
    """With the same global batch, on cached logits; `test_ranks` covers labels, too."""
    more = born_again(tmp_path) if case == "distilled" else {}
    rows = trained(training, payload(tmp_path / "together", *PLAIN, **more))
    alone = list(run_job("train", payload(tmp_path / "alone", *PLAIN, **more)))
    assert len(rows) == len(alone) == 2
    for one, other in zip(alone, rows, strict=True):
        for key in ("loss", "hard_loss", "val_nll", *(["soft_loss"] if more else [])):
            assert other[key] == pytest.approx(one[key], abs=1e-4), key


@pytest.mark.slow
def test_a_user_function_has_the_ranks(training: Pool, tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(USERS)
    job = payload(tmp_path / "own", *PLAIN, function=f"{tmp_path}/mine.py:train_fn")
    rows = trained(training, job)
    assert [row["val_accuracy"] for row in rows] == [1.0, 1.0]  # ranks 0 and 1
    assert (tmp_path / "own" / "student.safetensors").exists()
