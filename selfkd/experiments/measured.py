"""What settings are worth that were replicated: each replica measured on the test split, once."""

from __future__ import annotations

from collections.abc import Sequence

from selfkd.analysis.statistics import mean_interval
from selfkd.experiments.arms import Arm, Request, Run
from selfkd.results import Replicated, TrialResult


def measure_replicas(
    run: Run,
    arms: Sequence[Arm],
    trials: Sequence[Sequence[TrialResult]],
    *,
    title: str,
    known: Sequence[Replicated | None] = (),
) -> list[Replicated]:
    """Measure the replicas of each arm: on the test split, each model once.

    A user's training function has no test split here: its own metric is the measure.

    Args:
        run: Run at work.
        arms: Settings that were trained.
        trials: Completed trials of each.
        title: Name of the work, for people.
        known: What is measured of each already, on fewer seeds.
    """
    chosen_by, metric = run.config.search.metric, run.metric
    found: list[dict[int, float]] = [
        dict(zip(row.seeds, row.values, strict=True)) if row else {}
        for row in known or [None] * len(arms)
    ]
    waiting = [
        (number, trial)
        for number, rows in enumerate(trials)
        for trial in rows
        if trial.seed not in found[number]
    ]
    values = [trial.metrics[chosen_by] for _, trial in waiting]
    if run.function is None:
        requests = [Request(arms[number].model(run, trial)) for number, trial in waiting]
        tested = run.evaluate(requests, title=title, keep=False)
        values = [row.metrics[metric] for row in tested]
    for (number, trial), value in zip(waiting, values, strict=True):
        found[number][trial.seed] = value
    return [
        Replicated(
            seeds=tuple(trial.seed for trial in rows),
            metric=metric,
            values=tuple(own[trial.seed] for trial in rows),
            validation=tuple(trial.metrics[chosen_by] for trial in rows),
            mean=mean_interval([own[trial.seed] for trial in rows]),
            wanted=len(run.seeds(arm)),
        )
        for arm, rows, own in zip(arms, trials, found, strict=True)
    ]
