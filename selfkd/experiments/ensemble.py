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
from selfkd.experiments.teacher_row import keep_members
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
"""Students of one seed: from labels only, distilled, and distilled without the transfer set."""
WITHOUT = "without_transfer"
"""Name of the arm that is distilled without the transfer set."""


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
    labels = Arm(
        name="labels",
        title="student from labels only",
        folder=folder / "labels",
        space=config.space(with_teacher=False),
    )
    pairs: list[Pair] = []
    if labels.space or not config.confirm.seeds:  # as many trials for the baseline
        baseline = run.search(labels, save=folder / "labels.safetensors")
        labels = replace(labels, point=baseline.best.point)
        pairs = [(baseline.models[0], found.models[0])]
    if config.confirm.seeds:
        arms = [labels, replace(student, point=found.best.point)]
        if config.transfer:
            off = {**found.best.point, "data.transfer.weight": 0.0}
            arms.append(replace(student, name=WITHOUT, point=off, folder=folder / WITHOUT))
        pairs = _replicate(run, *arms)
    chosen, config = found.models[0], config.at(found.best.point)
    run.folder.keep_best(chosen.checkpoint)
    keep_members(run, teachers.of(config), config=config, students="the student")
    summary = _measure(run, teachers, found.best, pairs)
    own = "student of an ensemble", config, run.folder.facts, chosen.hash
    metrics = summary.chosen.metrics
    export(run, chosen, student.folder, describe_lineage(*own, teachers.of(config), metrics))
    return run.finish(summary)


def finished(config: Config, folder: RunFolder) -> EnsembleSummary | None:
    """Return the summary of a run that has nothing left to do, else None."""
    summary = folder.summary(EnsembleSummary)
    return summary if summary and summary.wanted >= config.confirm.seeds else None


def _replicate(run: Run, *arms: Arm) -> list[Pair]:
    """Return the students of a seed, of each arm: from labels only, and distilled."""
    folder = run.folder.path / "confirm"
    arms = tuple(replace(arm, name=f"confirm_{arm.name}", folder=folder / arm.name) for arm in arms)
    pairs = pair(run, arms, run.replicate(arms))
    if not pairs:
        raise RuntimeError("no pair of the confirmation could be trained")
    return pairs


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
    run: Run, teachers: Teachers, best: TrialResult, pairs: Sequence[Pair]
) -> EnsembleSummary:
    """Evaluate members, ensembles and students on the test split, and time them."""
    config, metric = run.config.at(best.point), run.metric
    own_teachers, average = teachers.of(config), config.distill.average
    members, soft = teachers.sources["members"], config.distill.mode == "tokens"
    labels, students, *without = zip(*pairs, strict=True)
    alone = [model for models in teachers.sources.values() for model in models]
    requests = [Request(model) for model in dict.fromkeys([*alone, *own_teachers])]
    requests += [Request(model, (), number == 0, config) for number, model in enumerate(labels)]
    requests += [
        Request(model, own_teachers, number == 0, config) for number, model in enumerate(students)
    ]
    requests += [Request(model, own_teachers, config=config) for one in without for model in one]
    by_hash = {row.hash: row for row in run.evaluate(requests, title="measuring on the test split")}
    of_labels, of_students, *of_without = (
        [by_hash[m.hash] for m in models] for models in (labels, students, *without)
    )
    named = dict(_ensembles(teachers.sources, run.config.distill.average))
    *averages, teacher = run.average([*named.values(), (own_teachers, average)])
    of_members = [by_hash[model.hash] for model in members]
    rows = [
        (_mean_row(f"single member, mean of {len(members)}", of_members, metric), members[:1]),
        (TableRow(name="best member on validation", metrics=of_members[0].metrics), members[:1]),
        *(
            (TableRow(name=name, metrics=row.metrics), models)
            for (name, (models, _)), row in zip(named.items(), averages, strict=True)
        ),
        (_mean_row("student, labels only", of_labels, metric), labels[:1]),
        *(
            (_mean_row("student, without transfer set", found, metric), models[:1])
            for found, models in zip(of_without, without, strict=True)
        ),
        (_mean_row("student, from its teacher", of_students, metric), students[:1]),
    ]
    *costs, cost = run.time([*(models for _, models in rows), own_teachers])
    values, *others = (
        [row.metrics[metric] for row in rows] for rows in (of_students, of_labels, *of_without)
    )
    gains = [[a - b for a, b in zip(values, other, strict=True)] for other in others]
    room = [teacher.metrics[metric] - value for value in others[0]]
    sign, floor = 1 if run.mode == "max" else -1, run.terms.floor
    names = ("the same from labels only", "the same without the transfer set")
    compared = [
        Pairs.of(
            "the student from its teacher", name, dict(enumerate(values)), dict(enumerate(other))
        )
        for name, other in zip(names, others, strict=False)
    ]
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
        seeds=len(pairs) if config.confirm.seeds else 0,
        wanted=config.confirm.seeds,
        gain=mean_interval(gains[0], floor=floor),
        transfer_gain=mean_interval(gains[1], floor=floor) if of_without else None,
        verdict=judge(compared, terms=run.terms),
        share=ratio_interval([sign * each for each in gains[0]], [sign * each for each in room]),
        diagnostics={
            "labels": of_labels[0].diagnostics,
            "student": of_students[0].diagnostics,
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
