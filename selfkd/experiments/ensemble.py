"""Many teachers, one student: train members, average them, distil the average, replicate.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
https://arxiv.org/abs/1503.02531
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from selfkd.analysis.families import Pairs, judge
from selfkd.analysis.statistics import mean_interval, ratio_interval
from selfkd.config import Config, Source
from selfkd.experiments.arms import Arm, Request, Run
from selfkd.experiments.export import describe_lineage, export
from selfkd.experiments.members import Teachers, make_teachers
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.teacher_row import members_beside
from selfkd.results import (
    Chosen,
    EnsembleSummary,
    Evaluation,
    Model,
    TableRow,
    TrialResult,
)

TITLES: dict[Source, str] = {
    "members": "ensemble",
    "snapshots": "snapshot ensemble",
    "soup": "mean of weights",
    "greedy_soup": "greedy mean of weights",
    "weighted": "ensemble, fitted weights",
    "specialists": "generalist and specialists",
}
AVERAGES = ("probabilities", "logits")
Pair = tuple[Model, ...]
"""Students of one seed, one of each arm."""
LABELS, STUDENT = "labels", "student"
"""Names of the arms that are trained on labels only, and distilled."""
WITHOUT = "without_transfer"
"""Name of the arm that is distilled without the transfer set."""
ROWS = {
    LABELS: "student, labels only",
    WITHOUT: "student, without transfer set",
    STUDENT: "student, from its teacher",
}
OTHERS = {LABELS: "the same from labels only", WITHOUT: "the same without the transfer set"}
"""What the student is compared with."""


def compress(run: Run) -> EnsembleSummary:
    """Make one model of many; what is done is kept.

    Returns:
        The summary, which is saved as `summary.json`.

    Raises:
        ConfigError: The data, the models or the members are not as the config says.
        RunError: All trials of a stage failed.
    """
    config, folder = run.config, run.folder.path
    teachers = make_teachers(run)
    student = Arm(
        name="student",
        title="student from the teachers",
        folder=folder / "student",
        teachers=teachers.of,
        space=config.space(with_teacher=True),
        points=config.search.points or (),
    )
    found = run.search(student, save=folder / "student.safetensors")
    models: dict[str, Sequence[Model]] = {}
    arms: list[Arm] = []
    if config.confirm.baseline:
        labels = Arm(
            name=LABELS,
            title="student from labels only",
            folder=folder / LABELS,
            space=config.space(with_teacher=False),
        )
        if labels.space or not config.confirm.seeds:  # as many trials for the baseline
            baseline = run.search(labels, save=folder / "labels.safetensors")
            labels = replace(labels, point=baseline.best.point)
            models[LABELS] = baseline.models[:1]
        arms.append(labels)
    models[STUDENT] = found.models[:1]
    arms.append(replace(student, point=found.best.point))
    if config.confirm.seeds:
        if config.transfer:
            off = {**found.best.point, "data.transfer.weight": 0.0}
            arms.append(replace(student, name=WITHOUT, point=off, folder=folder / WITHOUT))
        models = _replicate(run, arms)
    chosen, config = found.models[0], config.at(found.best.point)
    run.folder.keep_best(chosen.checkpoint)
    summary = _measure(run, teachers, found.best, models)
    own = "student of an ensemble", config, run.folder.facts, chosen.hash
    metrics = summary.chosen.metrics
    export(run, chosen, student.folder, describe_lineage(*own, teachers.of(config), metrics))
    return run.finish(summary)


def arms_of(config: Config) -> int:
    """Return how many settings are replicated on fresh seeds."""
    return 1 + config.confirm.baseline + (config.transfer is not None)


def finished(config: Config, folder: RunFolder) -> EnsembleSummary | None:
    """Return the summary of a run that has nothing left to do, else None."""
    summary = folder.summary(EnsembleSummary)
    if summary is None or summary.wanted < config.confirm.seeds:
        return None
    return None if config.confirm.baseline and summary.gain is None else summary


def _replicate(run: Run, arms: Sequence[Arm]) -> dict[str, Sequence[Model]]:
    """Return the students of each arm, by its name, of the seeds that all arms have."""
    folder = run.folder.path / "confirm"
    named = [replace(arm, name=f"confirm_{arm.name}", folder=folder / arm.name) for arm in arms]
    pairs = pair(run, named, run.replicate(named))
    if not pairs:
        raise RuntimeError("no pair of the confirmation could be trained")
    models = zip(*pairs, strict=True)
    return {arm.name: own for arm, own in zip(arms, models, strict=True)}


def pair(run: Run, arms: Sequence[Arm], trials: Sequence[Sequence[TrialResult]]) -> list[Pair]:
    """Return the students of arms that share a seed."""
    first, *others = (
        {trial.seed: arm.model(run, trial) for trial in rows}
        for arm, rows in zip(arms, trials, strict=True)
    )
    return [
        (model, *(other[seed] for other in others))
        for seed, model in first.items()
        if all(seed in other for other in others)
    ]


def _measure(
    run: Run, teachers: Teachers, best: TrialResult, models: Mapping[str, Sequence[Model]]
) -> EnsembleSummary:
    """Evaluate members, ensembles and students on the test split, and time them."""
    config, metric = run.config.at(best.point), run.metric
    own_teachers, average = teachers.of(config), config.distill.average
    beside = members_beside(run, own_teachers, config=config, students="the student")
    members, soft = teachers.sources["members"], config.distill.mode == "tokens"
    alone = [model for each in teachers.sources.values() for model in each]
    requests = [Request(model) for model in dict.fromkeys([*alone, *own_teachers])]
    for arm, own in models.items():
        of = () if arm == LABELS else own_teachers
        requests += [
            Request(model, of, arm != WITHOUT and number == 0, config)
            for number, model in enumerate(own)
        ]
    tested = run.evaluate(requests, title="measuring on the test split", beside=beside)
    by_hash = {row.hash: row for row in tested}
    measured = {arm: [by_hash[model.hash] for model in own] for arm, own in models.items()}
    named = dict(_ensembles(teachers.sources, run.config.distill.average))
    *averages, teacher = run.average([*named.values(), (own_teachers, average)])
    of_members = [by_hash[model.hash] for model in members]
    rows = [
        (_mean_row(f"single member, mean of {len(members)}", of_members, metric), members[:1]),
        (TableRow(name="best member on validation", metrics=of_members[0].metrics), members[:1]),
        *(
            (TableRow(name=name, metrics=row.metrics), each)
            for (name, (each, _)), row in zip(named.items(), averages, strict=True)
        ),
        *(
            (_mean_row(ROWS[arm], measured[arm], metric), models[arm][:1])
            for arm in (LABELS, WITHOUT, STUDENT)
            if arm in models
        ),
    ]
    *costs, cost = run.time([*(each for _, each in rows), own_teachers])
    values = {arm: [row.metrics[metric] for row in found] for arm, found in measured.items()}
    gains = {
        arm: [a - b for a, b in zip(values[STUDENT], other, strict=True)]
        for arm, other in values.items()
        if arm != STUDENT
    }
    room = [teacher.metrics[metric] - value for value in values.get(LABELS, ())]
    sign, floor = 1 if run.mode == "max" else -1, run.terms.floor
    compared = [
        Pairs.of(
            "the student from its teacher",
            OTHERS[arm],
            dict(enumerate(values[STUDENT])),
            dict(enumerate(values[arm])),
        )
        for arm in gains
    ]
    share = None
    if LABELS in gains:
        share = ratio_interval([sign * each for each in gains[LABELS]], [sign * x for x in room])
    intervals = {arm: mean_interval(own, floor=floor) for arm, own in gains.items()}
    return EnsembleSummary(
        rows=tuple(replace(row, **own) for (row, _), own in zip(rows, costs, strict=True)),
        teacher=teachers.row(config, teacher, cost),
        chosen=Chosen(
            point=best.point,
            temperature=config.distill.temperature if soft else None,
            alpha=config.distill.alpha if soft else None,
            average=average,
            metrics={k: v for k, v in best.metrics.items() if k.startswith("val_")},
            hash=best.hash,
        ),
        trials=config.search.trials,
        seeds=len(models[STUDENT]) if config.confirm.seeds else 0,
        wanted=config.confirm.seeds,
        gain=intervals.get(LABELS),
        transfer_gain=intervals.get(WITHOUT),
        verdict=judge(compared, terms=run.terms) if compared else None,
        share=share,
        diagnostics={
            arm: measured[arm][0].diagnostics for arm in (LABELS, STUDENT) if arm in measured
        },
    )


def _ensembles(
    sources: Mapping[Source, Sequence[Model]], average: str
) -> Iterator[tuple[str, tuple[Sequence[Model], str]]]:
    """Yield the names of the table's teachers, with members and average of each."""
    for source, models in sources.items():
        if source == "members":
            for each in AVERAGES:
                yield f"ensemble of {len(models)}, {each}", (models, each)
        elif len(models) == 1:
            yield TITLES[source], (models, average)
        else:
            yield f"{TITLES[source]}, of {len(models)}", (models, average)


def _mean_row(name: str, rows: Sequence[Evaluation], metric: str) -> TableRow:
    names = [name for name in rows[0].metrics if name.startswith(("val_", "test_"))]
    known = {n: [r.metrics[n] for r in rows if n in r.metrics] for n in names}  # some of the first
    means: dict[str, Any] = {n: sum(values) / len(values) for n, values in known.items()}
    runs = tuple(row.metrics[metric] for row in rows)
    interval = mean_interval(runs)
    return TableRow(name=name, metrics=means, low=interval.low, high=interval.high, runs=runs)
