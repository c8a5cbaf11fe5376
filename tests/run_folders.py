"""Run folders made by hand, with all that a run may hold; nothing is trained."""

from __future__ import annotations

import math
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import deployments

from selfkd.analysis.deploy import deploy_sentences
from selfkd.analysis.families import Pairs, Terms, judge
from selfkd.analysis.verdicts import ranges
from selfkd.config import Config, load_config
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import (
    ArmResult,
    ArmRun,
    Bin,
    CapacitySummary,
    Chosen,
    Confirmation,
    Confusion,
    ContrastResult,
    DeploySummary,
    Diagnostics,
    EnsembleSummary,
    Epoch,
    Evaluation,
    Example,
    Examples,
    Facts,
    GenerationResult,
    GenerationsSummary,
    Interval,
    McNemar,
    Member,
    Members,
    MembersRow,
    Model,
    Seeds,
    Size,
    StudySummary,
    TableRow,
    TeacherRow,
    TrialResult,
    Verdict,
)
from selfkd.storage.files import save_json
from selfkd.storage.rows import save_row

DATA = Facts(
    items={"train": 200, "val": 400, "test": 1197},
    outputs=10,
    parameters={"model": 24058, "student": 24058},
    fingerprints={
        "train": "ed6c50d478e09326",
        "val": "1a2afd616a158164",
        "test": "ea5531caf4546d4c",
    },
)
ENVIRONMENT: dict[str, Any] = {
    "started": "2026-11-24T12:00:00+00:00",
    "python": "3.13.1",
    "cpu": "A CPU",
    "cpus": 2,
    "gpus": [],
    "versions": {"selfkd": "0.1.0", "torch": "2.14.1", "ray": "2.60.0"},
}


PICTURE = (
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAAAAAA6fptVAAAACklEQVR42mNoAAAAggCB2kUIOwAAAABJRU5ErkJggg=="
)
"""A grey point."""


def generations_run(
    path: Path,
    *,
    rounds: int = 2,
    done: int | None = None,
    trials: int = 6,
    seed: int = 0,
    seeds: int = 3,
    data: Facts = DATA,
    lift: float = 0.004,
    diagnostics: bool = True,
    settings: tuple[str, ...] = (),
) -> Path:
    """Make the folder of a run of generations.

    Args:
        path: Folder.
        rounds: Number of generations after generation 0.
        done: Number of finished generations; all when not given.
        trials: Number of trials of each generation.
        seed: Seed of the run.
        seeds: Number of fresh seeds; nothing is replicated on 0.
        data: Facts of the data.
        lift: Gain in accuracy of each generation.
        diagnostics: Whether results have them; those of a user's training function have none.
        settings: Settings of the config.
    """
    rolled = random.Random(f"{seed} {lift} {trials}")
    done = rounds + 1 if done is None else done
    texts = (f"search.trials={trials}", f"confirm.seeds={seeds}", *settings)
    config = load_config(settings=texts, flags={"rounds": rounds, "seed": seed})
    _begin(path, "generations", config, data)
    results: list[GenerationResult] = []
    confirmations: list[Confirmation] = []
    for number in range(done):
        folder = path / f"generation_{number:03d}"
        tried = [_trial(folder, number, k, rolled, lift) for k in range(trials)]
        best = max(tried, key=lambda trial: trial.metrics["val_accuracy"])
        test = best.metrics["val_accuracy"] - 0.015
        result = _result(number, best, test, results, trials)
        if diagnostics:
            found = _diagnostics(test, number, rolled, data.outputs)
            result = replace(result, diagnostics={"val": found, "test": found})
        results.append(result)
        save_row(folder / "result.json", results[-1])
        if seeds:
            values = [test - 0.003 * rolled.random() for _ in range(seeds)]
            baseline = confirmations[0].values if confirmations else values
            confirmations.append(_confirmation(number, values, list(baseline), seed))
            save_row(folder / "confirmation.json", confirmations[-1])
    if done <= rounds:
        folder = path / f"generation_{done:03d}"
        _trial(folder, done, 0, rolled, lift)
        _trial(folder, done, 1, rolled, lift, failed="RuntimeError: out of memory")
    else:
        summary = GenerationsSummary(
            generations=tuple(results),
            confirmations=tuple(confirmations),
            verdict=_verdict(confirmations) if rounds else None,
            ensemble=Evaluation(hash="", parameters=72174, metrics=_metrics(0.972)),
        )
        save_row(path / "summary.json", summary)
        if rounds and diagnostics:
            save_row(path / "examples.json", _examples(rounds))
    return path


def _examples(rounds: int) -> Examples:
    gained = [
        Example(item=k, label=k, predicted=(k + 1, k), confidence=(0.6, 0.9), picture=PICTURE)
        for k in range(3)
    ]
    lost = replace(gained[0], predicted=(0, 1), confidence=(0.7, 0.8))
    return Examples(generations=(0, rounds), counts=(3, 1), gained=tuple(gained), lost=(lost,))


def _verdict(confirmations: list[Confirmation]) -> Verdict | None:
    if not confirmations:
        return None
    first, *others = (dict(zip(c.seeds, c.values, strict=True)) for c in confirmations)
    family = [
        Pairs.of(f"generation {k}", "generation 0", row, first)
        for k, row in enumerate(others, start=1)
    ]
    together = f"born-again generations {ranges(range(1, len(confirmations)))}, taken together,"
    return judge(family, terms=Terms(), together=together, noun="generation", method="closed")


STUDENT = Verdict(
    name="the student from its teacher",
    to="the same from labels only",
    difference=Interval(0.0117, 0.004, 0.0194),
    outcome="better",
    seeds=3,
    sentences=(
        "the student from its teacher is better than the same from labels only: +1.17 points "
        "[+0.40, +1.94] over 3 fresh seeds",
    ),
)


def ensemble_run(path: Path, *, done: bool = True, seed: int = 0) -> Path:
    """Make the folder of a run of an ensemble of three and its student."""
    rolled = random.Random(seed)
    settings = ("search.trials=4", "members.count=3", "confirm.seeds=3")
    config = load_config(settings=settings, flags={"seed": seed})
    _begin(path, "ensemble", config, DATA)
    trained = [_trial(path / "members", 0, k, rolled, 0) for k in range(3)]
    members = tuple(
        Member(
            hash=trial.hash,
            checkpoint=f"members/trial_{trial.trial:03d}/student.safetensors",
            model={"name": "selfkd_cnn", "args": {"width": 16}},
            metrics=trial.metrics,
        )
        for trial in trained
    )
    save_row(path / "members" / "result.json", Members(members=members))
    tried = [_trial(path / "student", 1, k, rolled, 0.01) for k in range(4)]
    if not done:
        return path
    best = max(tried, key=lambda trial: trial.metrics["val_accuracy"])
    labels, distilled = (0.945, 0.951, 0.948), (0.957, 0.96, 0.962)
    of_labels, of_student = (_diagnostics(0.95, number, rolled, 10) for number in (0, 1))
    summary = EnsembleSummary(
        verdict=STUDENT,
        rows=(
            _table_row("single member, mean of 3", 0.955, low=0.949, high=0.961),
            _table_row("best member on validation", 0.953),
            _table_row("ensemble of 3, probabilities", 0.964, parameters=72174),
            _table_row("student, labels only", 0.948, low=0.94, high=0.956, runs=labels),
            _table_row("student, from its teacher", 0.96, low=0.95, high=0.97, runs=distilled),
        ),
        teacher=TeacherRow(source="members", members=3, metrics=_metrics(0.964)),
        chosen=Chosen(
            point=best.point,
            temperature=best.point["distill.temperature"],
            alpha=best.point["distill.alpha"],
            average="probabilities",
            metrics={"val_accuracy": best.metrics["val_accuracy"]},
            hash=best.hash,
        ),
        trials=4,
        seeds=3,
        wanted=3,
        gain=Interval(0.0117, 0.004, 0.0194),
        share=Interval(0.72, 0.31, 4.2),
        diagnostics={
            "labels": {"val": of_labels, "test": of_labels},
            "student": {"val": of_student, "test": of_student},
        },
    )
    save_row(path / "summary.json", summary)
    return path


def capacity_run(path: Path) -> Path:
    """Make the folder of a capacity curve of three sizes."""
    settings = ("capacity.values=[2, 8, 32]", "confirm.seeds=2")
    _begin(path, "capacity", load_config(settings=settings), DATA)
    sizes = []
    for place, value in enumerate((2, 8, 32)):
        labels, distilled = 0.80 + 0.05 * place, 0.83 + 0.05 * place
        sizes.append(
            Size(
                value=value,
                parameters=100 * 4**place,
                labels=_seeds(labels),
                distilled=_seeds(distilled),
                difference=_around(0.03, 0.02),
                room=_around(0.964 - labels, 0.01),
                p_holm=0.01 if place else None,
                verdict="helps" if place else "unknown",
            )
        )
    summary = CapacitySummary(
        key="model.args.width",
        seeds=2,
        teacher=TeacherRow(
            source="members", members=5, metrics=_metrics(0.964), parameters=120_000
        ),
        sizes=tuple(sizes),
        verdict=Verdict(
            name="distilled students of 3 sizes, taken together,",
            to="the same from labels only",
            difference=Interval(0.03, 0.01, 0.05),
            outcome="better",
            seeds=3,
            sentences=(
                "distilled students of 3 sizes, taken together, are better than the same from "
                "labels only: +3.00 points [+1.00, +5.00] over 3 fresh seeds",
                "distillation helps from 400 to 1.6 k parameters; no evidence outside, corrected "
                "for all 4 comparisons (Holm)",
            ),
        ),
    )
    save_row(path / "summary.json", summary)
    return path


def study_run(path: Path) -> Path:
    """Make the folder of a study of two arms with teachers from elsewhere."""
    settings = ("study={arms: {labels: {}, distilled: {teacher: labels}}}", "confirm.seeds=2")
    _begin(path, "study", load_config(settings=settings), DATA)
    arms = [
        ArmResult(
            name=name,
            runs=tuple(
                ArmRun(number=number, seed=number, metrics={"test_accuracy": mean + off})
                for number, off in enumerate((-0.003, 0.003))
            ),
            mean=_around(mean, 0.02),
            errors=_around((1 - mean) * 1197, 5.0),
            agreement=_around(0.97, 0.01) if name == "distilled" else None,
        )
        for name, mean in (("labels", 0.93), ("distilled", 0.95))
    ]
    gain = Interval(0.02, 0.01, 0.03)
    verdict = Verdict(
        name="distilled",
        to="labels",
        difference=gain,
        outcome="better",
        seeds=2,
        sentences=(
            "distilled is better than labels: +2.00 points [+1.00, +3.00] over 2 fresh seeds",
        ),
    )
    summary = StudySummary(
        items=1197,
        seeds=2,
        arms=tuple(arms),
        contrasts=(ContrastResult(arm="distilled", to="labels", difference=gain),),
        verdict=verdict,
        members=MembersRow(count=1, metrics={"test_accuracy": 0.97, "test_errors": 36}),
    )
    save_row(path / "summary.json", summary)
    return path


def deploy_run(path: Path) -> Path:
    """Make the folder of a deployment of a file."""
    _begin(path, "deploy", load_config(settings=("deploy.prune=0.5",)), DATA)
    add_deployment(path)
    return path


def add_deployment(path: Path) -> DeploySummary:
    """Put what was deployed into the folder of a run."""
    rows = deployments.TORCH, deployments.FLOAT, deployments.INT8, *deployments.PRUNED
    made = deployments.deployment(*rows)
    made = replace(made, sentences=tuple(deploy_sentences(made, DATA)))
    save_row(path / "deploy" / "deploy.json", made)
    return made


def _around(value: float, half: float) -> Interval:
    return Interval(value, value - half, value + half)


def _seeds(value: float) -> Seeds:
    return Seeds(
        value=value, low=value - 0.01, high=value + 0.01, runs=(value - 4e-3, value + 4e-3)
    )


def _begin(path: Path, command: str, config: Config, data: Facts) -> None:
    RunFolder.create(path, config, command=command)
    save_row(path / "data.json", data)
    save_json(path / "environment.json", [ENVIRONMENT])


def _trial(
    folder: Path,
    generation: int,
    number: int,
    rolled: random.Random,
    lift: float,
    *,
    failed: str | None = None,
) -> TrialResult:
    top = 0.965 + lift * generation + 0.012 * rolled.random()
    history = tuple(
        Epoch(
            epoch=epoch,
            seconds=0.1 * epoch,
            metrics={
                "loss": 2.3 * math.exp(-epoch / 3),
                "hard_loss": 2.2 * math.exp(-epoch / 3),
                "soft_loss": 2.5 * math.exp(-epoch / 3),
                "val_accuracy": top * (1 - math.exp(-epoch / 2.0)) if epoch < 10 else top,
                "val_nll": 0.1 + 2 * math.exp(-epoch / 3),
            },
        )
        for epoch in range(1, 11)
    )
    point = {
        "distill.temperature": 20 ** rolled.random(),
        "distill.alpha": rolled.random(),
    }
    trial = TrialResult(
        stage=f"generation-{generation}",
        trial=number,
        seed=number,
        point=point if generation else {},
        status="failed" if failed else "completed",
        error=failed,
        hash="" if failed else f"{rolled.getrandbits(64):016x}",
        metrics={} if failed else history[-1].metrics,
        train_seconds=1.0,
        history=() if failed else history,
    )
    save_row(folder / f"trial_{number:03d}" / "result.json", trial)
    return trial


def _result(
    number: int,
    best: TrialResult,
    test: float,
    before: list[GenerationResult],
    trials: int,
) -> GenerationResult:
    tested = {
        "test_accuracy": test,
        "test_nll": 0.16 - 0.01 * number,
        "test_ece": 0.03 - 0.002 * number,
    }
    chosen = {name: best.metrics[name] for name in ("val_accuracy", "val_nll")}
    agreement = {"agreement": 0.95 + 0.005 * number} if number else {}
    checkpoint = f"generation_{number:03d}/student.safetensors"
    return GenerationResult(
        generation=number,
        trial=best.trial,
        point=best.point,
        temperature=best.point.get("distill.temperature"),
        alpha=best.point.get("distill.alpha"),
        metrics=chosen | tested | agreement,
        hash=best.hash,
        teachers=before[-1].models if before else (),
        models=(Model(best.hash, checkpoint),),
        parameters=24058,
        history=best.history,
        trials=trials,
        train_seconds=8.0,
        seconds=5.0,
    )


def _diagnostics(test: float, number: int, rolled: random.Random, classes: int) -> Diagnostics:
    bins = []
    for place in range(15):
        low, high = place / 15, (place + 1) / 15
        count = int(900 * (place / 14) ** 8)
        confidence = (low + high) / 2 if count else None
        right = None if confidence is None else max(0.0, confidence - 0.05 + 0.02 * number)
        bins.append(Bin(low=low, high=high, count=count, confidence=confidence, accuracy=right))
    confusions = tuple(
        Confusion(label=label, predicted=(label * 3 + 1) % classes, count=9 - label)
        for label in range(6)
    )
    return Diagnostics(
        metrics={
            **{"accuracy": test, "nll": 0.16, "brier": 0.05, "ece": 0.03},
            **({"agreement": 0.95, "kl": 0.04} if number else {}),
        },
        scaled={"temperature": 1.2, "nll": 0.15, "brier": 0.049, "ece": 0.012},
        reliability=tuple(bins),
        class_accuracy=(*(0.9 + 0.1 * rolled.random() for _ in range(classes - 1)), None),
        confusions=confusions,
        teacher_confusions=confusions[1:] if number else (),
    )


def _confirmation(
    number: int, values: list[float], baseline: list[float], seed: int
) -> Confirmation:
    mean = sum(values) / len(values)
    gain = mean - sum(baseline) / len(baseline)
    difference = _around(gain, 0.004) if number else None
    return Confirmation(
        generation=number,
        seeds=tuple(1000 * seed + k for k in range(len(values))),
        metric="test_accuracy",
        values=tuple(values),
        wanted=len(values),
        mean=Interval(mean) if len(values) == 1 else _around(mean, 0.004),
        first=difference,
        previous=difference,
        mcnemar=McNemar(only_student=12, only_teacher=7, p=0.359) if number else None,
    )


def _metrics(accuracy: float) -> dict[str, float]:
    return {
        "val_accuracy": accuracy + 0.01,
        "val_nll": 0.1,
        "test_accuracy": accuracy,
        "test_nll": 0.15,
        "test_ece": 0.03,
    }


def _table_row(name: str, accuracy: float, **more: Any) -> TableRow:
    costs = {"parameters": 24058, "ms_1": 0.4, "ms_128": 0.02}
    return TableRow(name=name, metrics=_metrics(accuracy), **(costs | more))
