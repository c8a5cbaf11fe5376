"""Arms: settings that are trained again on fresh seeds, the same for all, and compared in pairs.

A chosen model is the best of many, so its figures flatter it. Its setting on fresh seeds is chosen
by nobody; and where two settings share their seeds, and with them initialisation and order, the
difference of each pair says what the setting does.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Protocol

from selfkd.analysis.statistics import mean_interval, paired_interval
from selfkd.analysis.verdicts import count_seeds
from selfkd.config import Config, to_tree
from selfkd.config.space import Points
from selfkd.execution.jobs import Executor, Job
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.stages import Listener, Plan, Stage, run_all, run_stages, trial_seed
from selfkd.results import Row

TITLE = "confirmation on fresh seeds"


class ArmsListener(Listener, Protocol):
    """Whoever wants to follow arms as well as their stages."""

    def noted(self, text: str) -> None:
        """Something that a user should know."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A setting that is trained again."""

    name: str
    """Of its stage."""
    folder: Path
    plan: Plan
    """Of each trial, but for its seed."""


def confirm_seeds(config: Config, count: int | None = None) -> list[int]:
    """Return the seeds of the confirmation: those of no other trial, the same for every arm."""
    count = config.confirm.seeds if count is None else count
    return [trial_seed(config.seed, "confirm", number) for number in range(count)]


def retrain(
    config: Config,
    folder: RunFolder,
    executor: Executor,
    listener: ArmsListener,
    arms: Sequence[Arm],
    *,
    title: str = TITLE,
    seeds: Sequence[int] | None = None,
) -> list[list[Row]]:
    """Train each arm on each seed, all side by side; what is done is kept.

    Args:
        config: of the run.
        folder: what is done.
        executor: runs the trials.
        listener: is told of everything.
        arms: what is trained.
        title: for people.
        seeds: those of `confirm_seeds` when not given.

    Returns:
        For each arm the completed trials, in order of the seeds: the ledger's result with the
        `checkpoint`.

    Raises:
        RunError: all trials of an arm failed.
    """
    seeds = confirm_seeds(config) if seeds is None else seeds

    def stage(arm: Arm) -> Stage:
        return Stage(
            name=arm.name,
            title=title,
            folder=arm.folder,
            trials=len(seeds),
            plan=lambda number, _: replace(arm.plan, seed=seeds[number]),
            proposer=Points([{}] * len(seeds)),
            metric=config.search.metric,
            mode=config.search.mode,
        )

    stages = [stage(arm) for arm in arms]
    found = run_stages(config, folder, executor, listener, stages, title=title)
    done = [
        [
            {**row, "checkpoint": str(stage.trial(number) / "student.safetensors")}
            for number, row in sorted(trials.items())
            if row["status"] == "completed"
        ]
        for stage, trials in zip(stages, found, strict=True)
    ]
    failed = len(arms) * len(seeds) - sum(map(len, done))
    if failed:
        listener.noted(f"{failed} of the {len(arms) * len(seeds)} trials of the {title} failed")
    return done


def pair(trials: Sequence[Row], others: Sequence[Row]) -> list[tuple[Row, Row]]:
    """Return the trials of two arms that share a seed."""
    by_seed = {row["seed"]: row for row in others}
    return [(row, by_seed[row["seed"]]) for row in trials if row["seed"] in by_seed]


def measure(
    config: Config,
    executor: Executor,
    listener: Listener,
    arms: Sequence[Sequence[Row]],
    *,
    function: str | None = None,
) -> list[Row]:
    """Measure the trials of each arm: on the test split, each model once.

    A training function of the user's own has no test split here: its metric is the measure.

    Returns:
        For each arm `seeds`, `test_accuracy` and `validation` (the search's metric) in the order
        of the seeds, and their `mean`; of a function's arms `values` and the name of the `metric`.
    """
    metric, settings = config.search.metric, to_tree(config)
    rows: list[Row] = [
        {
            "seeds": [trial["seed"] for trial in trials],
            "test_accuracy": [],
            "validation": [trial[metric] for trial in trials],
        }
        for trials in arms
    ]
    if function is None:
        jobs = [
            Job("score", {"config": settings, "student": trial["checkpoint"]})
            for trials in arms
            for trial in trials
        ]
        tested = iter(run_all(executor, listener, "testing what was confirmed", jobs))
        for row in rows:
            row["test_accuracy"] = [next(tested)["test_accuracy"] for _ in row["seeds"]]
    else:
        for row in rows:
            row |= {"metric": metric, "values": row["validation"]}
    for row in rows:
        row["mean"] = asdict(mean_interval(_values(row)))
    return rows


def difference(measured: Row, other: Row, *, key: str = "test_accuracy") -> tuple[Row | None, str]:
    """Return the paired difference of two measured arms, and how many seeds were paired."""
    by_seed = dict(zip(other["seeds"], _values(other, key), strict=True))
    pairs = [
        (value, by_seed[seed])
        for seed, value in zip(measured["seeds"], _values(measured, key), strict=True)
        if seed in by_seed
    ]
    if not pairs:
        return None, count_seeds(0)
    values, others = zip(*pairs, strict=True)
    return asdict(paired_interval(values, others)), count_seeds(len(pairs))


def _values(measured: Row, key: str = "test_accuracy") -> list[float]:
    values: list[float] = measured["values"] if "values" in measured else measured[key]
    return values


def remove_students(arm: Path) -> None:
    """Remove the students of an arm that has been measured: the ledger keeps their results."""
    for student in arm.glob("trial_*/student.safetensors"):
        student.unlink()
