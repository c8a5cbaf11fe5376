"""The trials of a stage of a run, and the labelling of its teachers: what is done is kept."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from selfkd.config import Config, ModelConfig, to_tree
from selfkd.config.space import Distribution, Optuna, Point, Points, Proposer, make_points
from selfkd.errors import RunError
from selfkd.execution.jobs import Batch, EarlyStopping, Executor, Job, Outcome
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import CHECKPOINT, Row
from selfkd.storage.files import load_json, save_json
from selfkd.storage.remote import as_path

ATTEMPTS = 2  # at a part that fails, beside what the executor does for dead workers


class Listener(Protocol):
    """Whoever wants to follow the stages of a run: a terminal, a tracker."""

    def working(self, title: str, parts: int) -> None:
        """Something is done in so many parts, such as labelling."""

    def worked(self, row: Row) -> None:
        """A part is done; its `state`, of soft targets, is kept, written or remade."""

    def stage_started(self, title: str, trials: int, done: int) -> None:
        """A stage of so many trials begins, some of them done before a resume."""

    def trial_reported(self, trial: Row, rows: Sequence[Row]) -> None:
        """A running trial has new epochs."""

    def trial_finished(self, trial: Row) -> None:
        """A trial has its result: completed, stopped or failed."""

    def noted(self, text: str) -> None:
        """Something that a user should know."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one trial does."""

    config: Config
    model: ModelConfig
    seed: int
    teachers: Sequence[Row] = ()
    """`hash`, `checkpoint` (anywhere) and perhaps `weight` of each."""
    more: Row = field(default_factory=dict)
    """Further arguments of the job."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Trials that are chosen among, or averaged over."""

    name: str
    """Of its job type in W&B, such as generation-3."""
    title: str
    """For people."""
    folder: Path
    trials: int
    plan: Callable[[int, Point], Plan]
    """What the trial of a number does at a point."""
    proposer: Proposer
    early_stopping: bool = False
    """Whether the scheduler of the search may stop trials."""
    metric: str = "val_accuracy"
    """What the best trial is chosen by."""
    mode: Literal["max", "min"] = "max"

    def value(self, row: Row) -> float | None:
        """Return the metric of a row, to be maximised."""
        value = row.get(self.metric)
        return value if value is None or self.mode == "max" else -value

    def trial(self, number: int) -> Path:
        """Return the folder of a trial."""
        return self.folder / f"trial_{number:03d}"


def trial_seed(seed: int, stage: str | int, number: int) -> int:
    """Return the seed of a trial: its own, and the same in every run of the same config."""
    digest = hashlib.sha256(f"{seed}/{stage}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def located(folder: RunFolder, teachers: Sequence[Row]) -> list[Row]:
    """Return teachers with their checkpoints where a worker finds them."""
    return [
        {**teacher, "checkpoint": str(folder.path / teacher["checkpoint"])} for teacher in teachers
    ]


def generation_plan(
    config: Config,
    point: Point,
    *,
    generation: int,
    seed: int,
    teachers: Sequence[Row],
    function: str | None = None,
) -> Plan:
    """Return what a trial of a generation does.

    Args:
        config: of the run.
        point: of the search space.
        generation: whose network is trained.
        seed: of the trial.
        teachers: `located`.
        function: reference of a training function of the user's own.
    """
    own = config.at(point)
    model = own.student if generation > 0 and own.student else own.model
    more = {"function": function} if function else {}
    return Plan(config=own, model=model, seed=seed, teachers=teachers, more=more)


def make_proposer(
    config: Config, space: dict[str, Distribution], *, seed: int, last: Point | None = None
) -> Proposer:
    """Return what proposes the points of a search.

    Args:
        config: of the run.
        space: to search.
        seed: of the draws.
        last: the winner of a search before, which is tried first.
    """
    winner = {key: value for key, value in (last or {}).items() if key in space}
    first = [winner] if space and winner.keys() == space.keys() else []
    if config.search.algorithm == "optuna":
        return Optuna(space, seed=seed, first=first)
    algorithm, count = config.search.algorithm, config.search.trials
    return Points(make_points(space, count=count, algorithm=algorithm, seed=seed, first=first))


class _Trials:
    """The jobs of a stage: asks the proposer, writes each result into the ledger."""

    def __init__(self, stage: Stage, targets: Path, listener: Listener) -> None:
        self.stage, self.targets, self.listener = stage, targets, listener
        self.results: dict[int, Row] = {}
        self._open: dict[int, tuple[Row, list[Row]]] = {}
        self._heard: dict[int, int] = {}  # the last epoch that the listener was told of
        for number in range(stage.trials):
            path = stage.trial(number) / "result.json"
            result = load_json(path) if path.exists() else None
            if result is not None and result["status"] != "failed":
                self.results[number] = result
                stage.proposer.tell(number, result["point"], stage.value(result))
        self._waiting = [n for n in range(stage.trials) if n not in self.results]

    def ask(self) -> Job | None:
        if not self._waiting:
            return None
        number = self._waiting.pop(0)
        point = self.stage.proposer.ask(number)
        plan = self.stage.plan(number, point)
        trial = {
            "stage": self.stage.name,
            "trial": number,
            "seed": plan.seed,
            "point": point,
            "teachers": [teacher["hash"] for teacher in plan.teachers],
        }
        self._open[number] = (trial, [])
        payload = {
            "config": to_tree(plan.config),
            "stage": self.stage.name,
            "seed": plan.seed,
            "model": {"name": plan.model.name, "args": plan.model.args},
            "teachers": list(plan.teachers),
            "targets": str(self.targets),
            "student": str(self.stage.trial(number) / "student.safetensors"),
            **plan.more,
        }
        return Job("train", payload)

    def _number(self, job: Job) -> int:
        return int(Path(job.payload["student"]).parent.name.removeprefix("trial_"))

    def report(self, job: Job, rows: Sequence[Row]) -> None:
        trial, history = self._open[self._number(job)]
        for note in [row.pop("note") for row in rows if "note" in row]:
            where = f"{trial['stage'].replace('-', ' ')}, trial {trial['trial']}"
            self.listener.noted(f"{where}: {note}")
        # a trial whose worker died reports again what it had reported
        history[:] = [row for row in history if row["epoch"] < rows[0]["epoch"]] + list(rows)
        heard = self._heard.get(trial["trial"], 0)
        if fresh := [row for row in rows if row["epoch"] > heard]:
            self._heard[trial["trial"]] = fresh[-1]["epoch"]
            self.listener.trial_reported(trial, fresh)

    def tell(self, outcome: Outcome) -> None:
        number = self._number(outcome.job)
        trial, history = self._open.pop(number)
        last: Row = history[-1] if history else {}
        metrics = {self.stage.metric, "val_accuracy", "val_nll", "hash"}
        measured: Row = {key: last[key] for key in sorted(metrics) if key in last}
        status = "stopped" if outcome.stopped else "failed" if outcome.error else "completed"
        result = {
            **trial,
            "status": status,
            "error": outcome.error,
            **measured,
            "train_seconds": last.get("seconds", 0.0),
            "history": history,
        }
        save_json(self.stage.trial(number) / "result.json", result)
        if status != "failed":
            (self.stage.trial(number) / CHECKPOINT).unlink(missing_ok=True)
        self.results[number] = result
        self.stage.proposer.tell(number, trial["point"], self.stage.value(last))
        self.listener.trial_finished(result)


def run_stage(
    config: Config, folder: RunFolder, executor: Executor, listener: Listener, stage: Stage
) -> dict[int, Row]:
    """Run the trials of a stage that have no result yet; return the results of all.

    Raises:
        RunError: all trials failed.
    """
    trials = _Trials(stage, folder.targets(config), listener)
    listener.stage_started(stage.title, stage.trials, len(trials.results))
    asha = config.search.scheduler == "asha" and stage.early_stopping
    early = EarlyStopping(config.train.epochs, stage.metric, stage.mode) if asha else None
    executor.run(trials, early=early, limit=stage.proposer.limit)
    _check_some_completed(trials)
    return trials.results


def run_stages(
    config: Config,
    folder: RunFolder,
    executor: Executor,
    listener: Listener,
    stages: Sequence[Stage],
    *,
    title: str,
) -> list[dict[int, Row]]:
    """Run the trials of several stages side by side, each to its last epoch, as `run_stage`.

    Raises:
        RunError: all trials of a stage failed.
    """
    each = [_Trials(stage, folder.targets(config), listener) for stage in stages]
    done = sum(len(trials.results) for trials in each)
    listener.stage_started(title, sum(stage.trials for stage in stages), done)
    executor.run(_Several(each))
    for trials in each:
        _check_some_completed(trials)
    return [trials.results for trials in each]


class _Several:
    """The jobs of several stages, one after the other."""

    def __init__(self, stages: Sequence[_Trials]) -> None:
        self._stages = {trials.stage.folder: trials for trials in stages}

    def _of(self, job: Job) -> _Trials:
        return self._stages[as_path(job.payload["student"]).parent.parent]

    def ask(self) -> Job | None:
        jobs = (trials.ask() for trials in self._stages.values())
        return next((job for job in jobs if job is not None), None)

    def report(self, job: Job, rows: Sequence[Row]) -> None:
        self._of(job).report(job, rows)

    def tell(self, outcome: Outcome) -> None:
        self._of(outcome.job).tell(outcome)


def _check_some_completed(trials: _Trials) -> None:
    stage = trials.stage
    if not ranked(trials.results, stage):
        errors = [row["error"] for _, row in sorted(trials.results.items()) if row["error"]]
        raise RunError(
            f"all {stage.trials} trials of {stage.name.replace('-', ' ')} failed; "
            f"the first: {errors[0]}"
        )


def ranked(trials: dict[int, Row], stage: Stage) -> list[Row]:
    """Return the completed trials, best first: the stage's metric, ties by NLL."""
    completed = [trial for trial in trials.values() if trial["status"] == "completed"]

    def key(trial: Row) -> tuple[float, float, int]:
        return -(stage.value(trial) or 0.0), trial.get("val_nll", 0.0), trial["trial"]

    return sorted(completed, key=key)


def label(
    config: Config,
    folder: RunFolder,
    executor: Executor,
    listener: Listener,
    *,
    title: str,
    teachers: Sequence[Row],
    facts: Row | None = None,
) -> None:
    """Let teachers answer every view of every training image that is not stored yet.

    The work is split by teacher, view and shard of images; a part that fails is done again alone.

    Args:
        config: of those who are taught.
        folder: of the run.
        executor: does the work.
        listener: is told of it.
        title: for people.
        teachers: `located`.
        facts: of the data of `config`, where it is other than the run's.

    Raises:
        RunError: a part failed again.
    """
    facts = facts or load_json(folder.path / "data.json")
    shards = -(-facts["images"]["train"] // config.targets.shard_size)
    settings = to_tree(config)
    jobs = [
        Job(
            "label",
            {
                "config": settings,
                "checkpoint": teacher["checkpoint"],
                "targets": str(folder.targets(config)),
                "view": view,
                "shard": shard,
                "run": str(folder.path),
            },
        )
        for teacher in teachers
        for view in range(facts["views"])
        for shard in range(shards)
    ]
    run_all(executor, listener, title, jobs)


def run_all(executor: Executor, listener: Listener, title: str, jobs: Sequence[Job]) -> list[Row]:
    """Run jobs side by side, once more those that fail; return the last row of each, in order.

    Raises:
        RunError: a job failed again.
    """
    listener.working(title, len(jobs))
    rows: dict[int, Row] = {}
    for _ in range(ATTEMPTS):
        batch = _Parts([job for job in jobs if id(job) not in rows], listener)
        executor.run(batch)
        rows |= {id(done.job): done.row for done in batch.outcomes if done.error is None}
        if len(rows) == len(jobs):
            return [rows[id(job)] for job in jobs]
    errors = [outcome.error for outcome in batch.outcomes if outcome.error is not None]
    raise RunError(f"{title} failed: {errors[0]}")


class _Parts(Batch):
    def __init__(self, jobs: Sequence[Job], listener: Listener) -> None:
        super().__init__(jobs)
        self._listener = listener

    def tell(self, outcome: Outcome) -> None:
        super().tell(outcome)
        if outcome.error is None:
            self._listener.worked(outcome.row)
