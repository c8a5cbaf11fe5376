"""The trials of a stage: what is done is kept, the rest is run."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from selfkd.config import Config
from selfkd.config.space import Distribution, Optuna, Points, Proposer, make_points
from selfkd.errors import RunError
from selfkd.execution.jobs import EarlyStopping, Executor, Job, Outcome
from selfkd.experiments.run_folder import student_file, trial_folder
from selfkd.results import (
    CHECKPOINT,
    TIE,
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
)
from selfkd.storage.files import remove_file
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
    without: Collection[int] = ()
    """Numbers of trials that are left out."""

    @property
    def numbers(self) -> list[int]:
        """Numbers of its trials."""
        return [number for number in range(len(self.seeds)) if number not in self.without]

    def value(self, metrics: Mapping[str, float]) -> float | None:
        """Return what is chosen by, to be maximised; None where it was not measured."""
        value = metrics.get(self.metric)
        if value is None or not math.isfinite(value):
            return None
        return value if self.mode == "max" else -value

    def fault(self, last: Epoch) -> str | None:
        """Return why a trial cannot be compared with others after its last epoch, if it cannot."""
        if self.value(last.metrics) is not None:
            return None
        value = last.metric(self.metric)
        found = "was not reported" if value is None else f"is {value}"
        return (
            f"{self.metric} {found} at epoch {last.epoch}: search.metric must be finite at the "
            "last epoch"
        )

    def ranked(self, trials: Sequence[TrialResult]) -> list[TrialResult]:
        """Return the completed trials, best first; ties by NLL."""

        def key(trial: TrialResult) -> tuple[float, float, int]:
            value, nll = self.value(trial.metrics), trial.metrics.get(TIE, 0.0)
            return -(value or 0.0), math.inf if math.isnan(nll) else nll, trial.trial

        return sorted((trial for trial in trials if trial.status == "completed"), key=key)


def trial_seed(seed: int, stage: str | int, number: int) -> int:
    """Return the seed of a trial: its own, and the same in every run of the same config."""
    digest = hashlib.sha256(f"{seed}/{stage}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


def make_proposer(
    config: Config,
    space: Mapping[str, Distribution],
    *,
    seed: int,
    last: Point | None = None,
    more: Sequence[Point] = (),
) -> Proposer:
    """Return what proposes the points of a search.

    Args:
        config: Config of the run.
        space: Search space by dotted key.
        seed: Seed of the draws.
        last: Winner of a search before, which is tried first.
        more: Points to try next, inside the space or not.
    """
    winner = {key: value for key, value in (last or {}).items() if key in space}
    first = [winner] if space and winner.keys() == space.keys() else []
    first += more  # a winner that is among them gets a second seed
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
    trials = _Trials(stages, events)
    done = sum(map(len, trials.results.values()))
    events(StageStarted(title, sum(len(stage.numbers) for stage in stages), done))
    alone = stages[0] if len(stages) == 1 else None
    early, limit = (alone.early, alone.proposer.limit) if alone else (None, None)
    executor.run(trials, early=early, limit=limit)
    found = [[row for _, row in sorted(rows.items())] for rows in trials.results.values()]
    empty = [not stage.ranked(results) for stage, results in zip(stages, found, strict=True)]
    for stage, results, is_empty in zip(stages, found, empty, strict=True):
        if is_empty and (each or all(empty)):
            errors = [row.error for row in results if row.error]
            raise RunError(
                f"all {len(stage.numbers)} trials of {stage.name.replace('-', ' ')} failed; "
                f"the first: {errors[0]}"
            )
    return found


@dataclass
class _Running:
    """A trial at work."""

    stage: Stage
    trial: Trial
    history: list[Epoch] = field(default_factory=list)
    reported: int = 0
    """Last epoch that was an event: a trial whose worker died reports its epochs again."""


class _Trials:
    """The jobs of stages, one stage after the other; each result is written down."""

    def __init__(self, stages: Sequence[Stage], events: Events) -> None:
        self._events = events
        self.results: dict[Path, dict[int, TrialResult]] = {stage.folder: {} for stage in stages}
        self._running: dict[str, _Running] = {}
        self._waiting: list[tuple[Stage, int]] = []
        for stage in stages:
            for number in stage.numbers:
                path = _result_file(stage, number)
                known = load_row(TrialResult, path) if path.exists() else None
                wanted = (stage.name, number, stage.seeds[number])
                if known and (known.stage, known.trial, known.seed) != wanted:
                    raise ValueError(f"{path} is of another trial: remove it and resume")
                if known is None or known.status == "failed" or stage.value(known.metrics) is None:
                    self._waiting.append((stage, number))
                else:
                    self._keep(stage, known)

    def _keep(self, stage: Stage, result: TrialResult) -> None:
        self.results[stage.folder][result.trial] = result
        stage.proposer.tell(result.trial, result.point, stage.value(result.metrics))

    def ask(self) -> Job | None:
        if not self._waiting:
            return None
        stage, number = self._waiting.pop(0)
        payload = stage.payload(number, stage.proposer.ask(number))
        trial = Trial(
            stage=stage.name,
            trial=number,
            seed=stage.seeds[number],
            point=payload.pop("point"),
            teachers=tuple(teacher["hash"] for teacher in payload["teachers"]),
        )
        student = str(student_file(stage.folder, number))
        self._running[student] = _Running(stage, trial)
        own = {"stage": trial.stage, "seed": trial.seed, "student": student}
        return Job("train", payload | own)

    def report(self, job: Job, rows: Sequence[Row]) -> None:
        running = self._running[job.payload["student"]]
        for row in rows:
            if "note" in row:
                where = f"{running.stage.name.replace('-', ' ')}, trial {running.trial.trial}"
                self._events(Message(f"{where}: {row['note']}"))
        by_epoch = {row["epoch"]: Epoch.reported(row) for row in rows}  # the last row of each
        epochs, history = list(by_epoch.values()), running.history
        history[:] = [row for row in history if row.epoch < epochs[0].epoch] + epochs
        if fresh := tuple(row for row in epochs if row.epoch > running.reported):
            running.reported = fresh[-1].epoch
            self._events(TrialProgressed(running.trial, fresh))

    def tell(self, outcome: Outcome) -> None:
        running = self._running.pop(outcome.job.payload["student"])
        last = running.history[-1] if running.history else Epoch(epoch=0)
        error = outcome.error or running.stage.fault(last)
        saved = [row.hash for row in running.history if row.hash is not None]
        result = TrialResult(
            **vars(running.trial),
            status="failed" if error else "stopped" if outcome.stopped else "completed",
            error=error,
            hash=saved[-1] if saved else "",
            metrics=last.metrics,
            train_seconds=last.seconds,
            history=tuple(running.history),
        )
        path = _result_file(running.stage, result.trial)
        save_row(path, result)
        if result.status != "failed":
            remove_file(path.parent / CHECKPOINT)
        self._keep(running.stage, result)
        self._events(TrialFinished(result))


def _result_file(stage: Stage, number: int) -> Path:
    return trial_folder(stage.folder, number) / "result.json"
