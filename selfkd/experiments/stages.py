"""The trials of a stage: what is done is kept, the rest is run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from selfkd.config import Config
from selfkd.config.space import Distribution, Optuna, Points, Proposer, make_points
from selfkd.errors import RunError
from selfkd.execution.jobs import EarlyStopping, Executor, Job, Outcome
from selfkd.experiments.run_folder import student_file, trial_folder
from selfkd.results import (
    CHECKPOINT,
    Epoch,
    Events,
    Message,
    Point,
    Row,
    StageStarted,
    Trial,
    TrialFinished,
    TrialProgressed,
    TrialResult,
    from_row,
)
from selfkd.storage.files import load_json
from selfkd.storage.remote import as_path
from selfkd.storage.rows import load_row, save_row


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Trials that are chosen among, or averaged over."""

    name: str
    """Job type in W&B, such as generation-3."""
    folder: Path
    seeds: Sequence[int]
    """Seeds of the trials, one each."""
    proposer: Proposer
    payload: Callable[[int, Point], Row]
    """Arguments of the training job of a trial at a point."""
    metric: str
    """What the best trial is chosen by."""
    mode: Literal["max", "min"]
    early: EarlyStopping | None = None

    def value(self, metrics: Mapping[str, float]) -> float | None:
        """Return what is chosen by, to be maximised; None where it was not measured."""
        value = metrics.get(self.metric)
        return value if value is None or self.mode == "max" else -value

    def ranked(self, trials: Sequence[TrialResult]) -> list[TrialResult]:
        """Return the completed trials, best first; ties by NLL."""

        def key(trial: TrialResult) -> tuple[float, float, int]:
            value, nll = self.value(trial.metrics), trial.metrics.get("val_nll", 0.0)
            return -(value or 0.0), nll, trial.trial

        return sorted((trial for trial in trials if trial.status == "completed"), key=key)


def trial_seed(seed: int, stage: str | int, number: int) -> int:
    """Return the seed of a trial: its own, and the same in every run of the same config."""
    digest = hashlib.sha256(f"{seed}/{stage}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def make_proposer(
    config: Config, space: Mapping[str, Distribution], *, seed: int, last: Point | None = None
) -> Proposer:
    """Return what proposes the points of a search.

    Args:
        config: Config of the run.
        space: Search space by dotted key.
        seed: Seed of the draws.
        last: Winner of a search before, which is tried first.
    """
    winner = {key: value for key, value in (last or {}).items() if key in space}
    first = [winner] if space and winner.keys() == space.keys() else []
    if config.search.algorithm == "optuna":
        return Optuna(space, seed=seed, first=first)
    algorithm, count = config.search.algorithm, config.search.trials
    return Points(make_points(space, count=count, algorithm=algorithm, seed=seed, first=first))


def run_stages(
    executor: Executor, events: Events, stages: Sequence[Stage], *, title: str, each: bool = True
) -> list[list[TrialResult]]:
    """Run the trials of stages that have no result yet; return the results of all.

    Those of several stages are run side by side, each to its last epoch.

    Args:
        executor: Executor of the trials.
        events: Callback for what happens.
        stages: Stages to run.
        title: Name of the work, for people.
        each: Whether some trial of each stage must complete, or only some of all.

    Raises:
        RunError: All trials of a stage failed, or of all stages.
    """
    sides = [_Trials(stage, events) for stage in stages]
    done = sum(len(trials.results) for trials in sides)
    events(StageStarted(title, sum(len(stage.seeds) for stage in stages), done))
    alone = stages[0] if len(stages) == 1 else None
    jobs = sides[0] if alone else _Several(sides)
    limit = alone.proposer.limit if alone else None
    executor.run(jobs, early=alone.early if alone else None, limit=limit)
    found = [[row for _, row in sorted(trials.results.items())] for trials in sides]
    empty = [not stage.ranked(results) for stage, results in zip(stages, found, strict=True)]
    for stage, results, is_empty in zip(stages, found, empty, strict=True):
        if is_empty and (each or all(empty)):
            errors = [row.error for row in results if row.error]
            raise RunError(
                f"all {len(stage.seeds)} trials of {stage.name.replace('-', ' ')} failed; "
                f"the first: {errors[0]}"
            )
    return found


class _Trials:
    """The jobs of a stage: asks the proposer, writes each result down."""

    def __init__(self, stage: Stage, events: Events) -> None:
        self.stage, self._events = stage, events
        self.results: dict[int, TrialResult] = {}
        self._running: dict[int, tuple[Trial, list[Epoch]]] = {}
        self._told: dict[int, int] = {}  # the last epoch of each that was an event
        for number in range(len(stage.seeds)):
            path = self._path(number)
            if path.exists() and load_json(path)["status"] != "failed":
                result = load_row(TrialResult, path)
                self.results[number] = result
                stage.proposer.tell(number, result.point, stage.value(result.metrics))
        self._waiting = [n for n in range(len(stage.seeds)) if n not in self.results]

    def _path(self, number: int) -> Path:
        return trial_folder(self.stage.folder, number) / "result.json"

    def ask(self) -> Job | None:
        if not self._waiting:
            return None
        number = self._waiting.pop(0)
        point = self.stage.proposer.ask(number)
        payload = self.stage.payload(number, point)
        trial = Trial(
            stage=self.stage.name,
            trial=number,
            seed=self.stage.seeds[number],
            point=payload.pop("point"),
            teachers=tuple(teacher["hash"] for teacher in payload["teachers"]),
        )
        self._running[number] = (trial, [])
        student = str(student_file(self.stage.folder, number))
        own = {"stage": trial.stage, "seed": trial.seed, "student": student}
        return Job("train", payload | own)

    def _number(self, job: Job) -> int:
        return int(as_path(job.payload["student"]).parent.name.removeprefix("trial_"))

    def report(self, job: Job, rows: Sequence[Row]) -> None:
        trial, history = self._running[self._number(job)]
        for row in rows:
            if "note" in row:
                where = f"{trial.stage.replace('-', ' ')}, trial {trial.trial}"
                self._events(Message(f"{where}: {row['note']}"))
        epochs = [from_row(Epoch, row) for row in rows]
        # a trial whose worker died reports again what it had reported
        history[:] = [row for row in history if row.epoch < epochs[0].epoch] + epochs
        told = self._told.get(trial.trial, 0)
        if fresh := tuple(row for row in epochs if row.epoch > told):
            self._told[trial.trial] = fresh[-1].epoch
            self._events(TrialProgressed(trial, fresh))

    def tell(self, outcome: Outcome) -> None:
        number = self._number(outcome.job)
        trial, history = self._running.pop(number)
        last = history[-1] if history else Epoch(epoch=0)
        result = TrialResult(
            **vars(trial),
            status="stopped" if outcome.stopped else "failed" if outcome.error else "completed",
            error=outcome.error,
            hash=last.hash or "",
            metrics=last.metrics,
            train_seconds=last.seconds,
            history=tuple(history),
        )
        save_row(self._path(number), result)
        if result.status != "failed":
            (self._path(number).parent / CHECKPOINT).unlink(missing_ok=True)
        self.results[number] = result
        self.stage.proposer.tell(number, trial.point, self.stage.value(last.metrics))
        self._events(TrialFinished(result))


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
