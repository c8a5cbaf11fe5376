"""Several workers that train one student: Ray Train within the pool's trials."""

from __future__ import annotations

import errno
import queue
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import ray
import torch.distributed as dist
from train_jobs import PLAIN, born_again, payload

from selfkd.execution import group
from selfkd.execution.group import Group, JobError, WorkerLostError
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


AWAY = OSError(errno.EIO, "the storage is away")
LOST = ray.exceptions.RayError("the worker died")


@pytest.mark.parametrize(
    ("last", "raised", "message"),
    [
        ({"raised": "ValueError: rank 1 fails"}, JobError, "ValueError: rank 1 fails"),
        ({"raised": AWAY}, OSError, "the storage is away"),
        (LOST, WorkerLostError, "the worker died"),
    ],
)
def test_an_error_ends_the_rows_and_frees_what_the_group_holds(
    last: Any, raised: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An error of the job is not repeated, one of the storage or of a process is."""
    freed = list[Any]()

    def get(reference: Any) -> Any:
        if isinstance(reference, Exception):
            raise reference
        return reference

    monkeypatch.setattr(ray, "get", get)
    monkeypatch.setattr(ray, "cancel", lambda rows, force: freed.append(("cancel", force)))
    monkeypatch.setattr(group, "remove_placement_group", freed.append)
    rows = group._stream_rows([{"placement_group": "held"}, {"epoch": 1}, last, {"epoch": 2}])
    assert next(rows) == {"epoch": 1}
    with pytest.raises(raised, match=message):
        next(rows)
    assert freed == [("cancel", True), "held"]


def fail(kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
    yield {"epoch": 1}
    raise payload["error"]


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("error", "sent"),
    [
        (ValueError("it fails"), [{"raised": "ValueError: it fails"}]),
        (RuntimeError("it fails"), [{"raised": "RuntimeError: it fails"}]),
        (AWAY, [{"raised": AWAY}]),
        (RuntimeError("[gloo] Connection closed by peer"), []),  # what is left of a dead rank
    ],
)
def test_every_rank_sends_its_own_errors_and_the_first_its_rows(
    error: Exception, sent: list[Row], rank: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: queue.Queue[Row] = queue.Queue()
    monkeypatch.setattr(dist, "get_rank", lambda: rank)
    monkeypatch.setattr(group, "get_current_placement_group", lambda: "held")
    with pytest.raises(type(error), match=r"fails|away|closed"):
        group._on_rank({"entry": f"{__name__}:fail", "payload": {"error": error}, "rows": rows})
    first = [{"placement_group": "held"}, {"epoch": 1}] if rank == 0 else []
    assert list(rows.queue) == [*first, *sent]


def lose_rank(rows: Any) -> None:
    rows.put({"raised": "ValueError: rank 1 fails"})
    rows.put({"raised": "ValueError: a consequence"})
    raise RuntimeError("the group failed")


def lose_process(rows: Any) -> None:
    raise RuntimeError("the group failed")


@pytest.mark.parametrize(
    ("end", "last"),
    [
        (lambda rows: None, []),
        (lose_rank, [{"raised": "ValueError: rank 1 fails"}]),
        (lose_process, "the group failed"),
    ],
)
def test_of_a_groups_errors_the_first_of_a_rank_is_told(
    end: Callable[[Any], None], last: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Rows(queue.Queue[Row]):
        def __init__(self, actor_options: Any) -> None:
            super().__init__()

    class Trainer:
        def __init__(self, loop: Any, *, train_loop_config: Any, **_: Any) -> None:
            self.rows = train_loop_config["rows"]

        def fit(self) -> None:
            self.rows.put({"epoch": 1})
            end(self.rows)

    monkeypatch.setattr(group, "Queue", Rows)
    monkeypatch.setattr(group, "_SETTINGS", {})
    monkeypatch.setattr("ray.train.torch.TorchTrainer", Trainer)
    rows = group._train._function("a:b", {}, Group(workers=2, cpu=1, gpu=0), str(tmp_path))
    assert next(rows) == {"epoch": 1}
    if isinstance(last, str):
        with pytest.raises(RuntimeError, match=last):
            next(rows)
    else:
        assert list(rows) == last


@pytest.mark.parametrize(("kinds", "more"), [("", True), ("t", True), ("tt", False), ("et", False)])
def test_a_group_begins_where_all_its_workers_fit(
    kinds: str, more: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = {"Alive": True, "Resources": {"CPU": 4.0}}
    monkeypatch.setattr(ray, "nodes", lambda: [node, {**node, "Alive": False}])
    pool = Pool("rank_jobs:run_job", cpu=1, gpu=0, warm=1, workers=2)
    names = {"t": "train", "e": "evaluate"}
    assert pool._has_room([Job(names[kind], {}) for kind in kinds]) is more


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(num_cpus=2, log_to_driver=False, logging_level="CRITICAL", include_dashboard=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def pool(cluster: None) -> Iterator[Pool]:
    with Pool("rank_jobs:run_job", cpu=1, gpu=0, warm=1, workers=2) as pool:
        yield pool


class Recorded(Batch):
    """A batch that collects the rows of each job."""

    def __init__(self, jobs: list[Job]) -> None:
        super().__init__(jobs)
        self.rows: dict[str, list[Row]] = {}

    def report(self, job: Job, rows: Any) -> None:
        self.rows.setdefault(job.payload.get("name", ""), []).extend(rows)


def test_training_runs_on_groups_whose_rank_0_reports(pool: Pool) -> None:
    batch = Recorded([Job("train", {"name": "a", "epochs": 3})])
    pool.run(batch)
    assert [outcome.error for outcome in batch.outcomes] == [None]
    assert [row["epoch"] for row in batch.rows["a"]] == [1, 2, 3]
    assert {(row["rank"], row["size"], row["sum"]) for row in batch.rows["a"]} == {(0, 2, 3.0)}


@pytest.mark.slow  # a group takes ten seconds to start; the parts of it are tested above
def test_a_rank_that_fails_ends_its_group_and_is_not_repeated(pool: Pool) -> None:
    batch = Recorded([Job("train", {"name": "b", "epochs": 3, "fails": 1})])
    pool.run(batch)
    assert [outcome.error for outcome in batch.outcomes] == ["ValueError: rank 1 fails"]
    assert [row["epoch"] for row in batch.rows["b"]] == [1]


def test_other_jobs_get_one_warm_worker(pool: Pool) -> None:
    batch = Recorded([Job("evaluate", {"name": str(n), "epochs": 2}) for n in range(4)])
    pool.run(batch, limit=1)  # each job beside another has a coordinator of its own
    rows = [row for job in batch.rows.values() for row in job]
    assert [row["size"] for row in rows] == [1] * 8
    assert len({row["pid"] for row in rows}) < 4


def test_an_error_fails_a_job_of_one_worker(pool: Pool) -> None:
    batch = Recorded([Job("evaluate", {"name": "a", "epochs": 3, "fails": 0})])
    pool.run(batch)
    assert [outcome.error for outcome in batch.outcomes] == ["ValueError: rank 0 fails"]


@pytest.mark.slow  # a worker that dies, in test_pool; what a group makes of it, above
@pytest.mark.parametrize("rank", [0, 1])
def test_a_job_whose_rank_dies_is_repeated(pool: Pool, tmp_path: Path, rank: int) -> None:
    job = {"name": "a", "epochs": 3, "dies": rank, "died": str(tmp_path / "died")}
    batch = Recorded([Job("train", job)])
    pool.run(batch)
    assert (tmp_path / "died").exists()
    assert [(outcome.error, outcome.row["epoch"]) for outcome in batch.outcomes] == [(None, 3)]


@pytest.mark.slow  # in test_pool without a group; what a group makes of it, above
@pytest.mark.parametrize("kind", ["evaluate", "train"])
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
    """The workers are released: all CPUs are available again."""
    jobs = [
        {"name": "good", "epochs": 60, "accuracy": 0.9},
        {"name": "bad", "epochs": 60, "accuracy": 0.1, "pause": 0.3},
    ]
    batch = Recorded([Job("train", {**job, "trace": str(tmp_path / job["name"])}) for job in jobs])
    pool.run(batch, early=EarlyStopping(60), limit=1)  # so that one can be worse
    assert [outcome.stopped for outcome in batch.outcomes] == [False, True]
    deadline = time.monotonic() + 600
    while ray.available_resources().get("CPU", 0) < 2:
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
