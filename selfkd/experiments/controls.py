"""Controls of equal cost: could something else than the teacher have made the gain?

Each is searched in as many trials as a generation, beside generation 1, and replicated on the same
seeds. The ensemble of seeds stands beside the ensemble of the generations.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from selfkd.analysis.families import Pairs, judge
from selfkd.config import Config, Control
from selfkd.config.space import Distribution
from selfkd.experiments.arms import Arm, Request, Run
from selfkd.experiments.confirm import labels_only
from selfkd.experiments.lineages import in_lineages
from selfkd.experiments.measured import measure_replicas
from selfkd.experiments.replicas import confirm_seeds, contrast, pair_up, remove_students
from selfkd.experiments.teachers import prepare_teachers
from selfkd.results import (
    Confirmation,
    ControlResult,
    GenerationResult,
    Interval,
    Model,
    Point,
    Replicated,
    Verdict,
)
from selfkd.storage.rows import load_row, save_row

TITLES: dict[Control, str] = {
    "seeds": "ensemble of seeds",
    "label_smoothing": "label smoothing",
    "dkpp": "permuted teacher logits",
    "cwtm": "confidence weights",
    "teacher_free": "teacher-free",
    "hard": "teacher's arg max",
    "class_mean": "mean soft target a class",
}
SMOOTHING = {"uniform": [0.0, 0.5]}
TEMPERATURE = "distill.temperature"
TRANSFORMS = {
    "dkpp": "permuted",
    "cwtm": "confidence",
    "teacher_free": "virtual",
    "hard": "hard",
    "class_mean": "class_mean",
}
DISTILLED: tuple[Control, ...] = ("dkpp", "cwtm", "hard", "class_mean")
"""Controls that are distilled from the teacher of generation 1."""
WITHOUT_TEMPERATURE: tuple[Control, ...] = ("hard",)


def run_controls(
    run: Run, results: Sequence[GenerationResult], confirmations: Sequence[Confirmation]
) -> list[ControlResult]:
    """Train and measure the controls of the config that are not done yet; return all their rows.

    Raises:
        RunError: All trials of a stage failed.
    """
    wanted: list[Control] = list(dict.fromkeys(run.config.controls))
    known: dict[Control, ControlResult] = {
        name: load_row(ControlResult, path)
        for name in wanted
        if name != "seeds" and (path := _path(run, name)).exists()
    }
    most = run.config.confirm.replicas
    done = {name for name, row in known.items() if row.wanted >= most} | {"seeds"}
    waiting = [name for name in wanted if name not in done]
    arms = [_search(run, name, results) for name in waiting]
    if arms:
        trials = run.replicate(arms, title="controls on the same fresh seeds")
        before = [known.get(name) for name in waiting]
        measured = measure_replicas(run, arms, trials, title="testing the controls", known=before)
        for name, arm, own in zip(waiting, arms, measured, strict=True):
            save_row(_path(run, name), _row(run, name, arm.point, own, confirmations))
    if "seeds" in wanted and not _has_as_many(_path(run, "seeds"), len(results)):
        save_row(_path(run, "seeds"), _seeds(run, results))
    for control in wanted:  # of all: a kill may have come between a result and this
        remove_students(_path(run, control).parent)
    return [load_row(ControlResult, _path(run, name)) for name in wanted]


def judge_controls(
    run: Run, confirmations: Sequence[Confirmation], controls: Sequence[ControlResult]
) -> Verdict | None:
    """Return the verdict on generation 1 beside the controls, in one sentence, if there are any.

    That on the ensemble of generations stands beside the ensemble of seeds.
    """
    if not controls:
        return None
    facts = run.folder.facts
    items = f"{facts.count('test'):,} test {facts.tested_on}"
    family = [
        Pairs(
            name=f"the ensemble of {row.models} generations",
            to=f"the {row.title}",
            over_items=row.born_again,
            items=items,
        )
        if row.name == "seeds"
        else pair_up("generation 1", row.title, confirmations[1], row)
        for row in controls
    ]
    verdict = judge(family, terms=run.terms)
    return replace(verdict, sentences=("at equal cost: " + "; ".join(verdict.sentences),))


def _path(run: Run, name: str) -> Path:
    return run.folder.path / "controls" / name / "result.json"


def _has_as_many(path: Path, generations: int) -> bool:
    return path.exists() and load_row(ControlResult, path).models == generations


def _search(run: Run, name: Control, results: Sequence[GenerationResult]) -> Arm:
    """Return a control's best setting, to be replicated."""
    teachers = results[1].teachers if name in DISTILLED else ()
    if teachers:  # their logits are cached, unless somebody has removed them
        prepare_teachers(run, teachers, of=TITLES[name])
    options = {"transform": TRANSFORMS[name]} if name in TRANSFORMS else {}
    folder = run.folder.path / "controls" / name
    arm = Arm(
        name=f"control_{name}",
        title=f"control: {TITLES[name]}",
        folder=folder,
        teachers=lambda own, number: teachers,
        network=lambda own, number: own.network(1),  # beside which its row stands
        options=lambda number: options,
        space=_space(run.config, name),
        points=_points(run.config, name),
    )
    point = run.search(arm).best.point
    arm = replace(arm, name=f"{arm.name}_confirm", folder=folder / "confirm", point=point)
    return in_lineages(run, arm, results[1]) if name in DISTILLED else arm


def _space(config: Config, name: Control) -> dict[str, Distribution]:
    if name == "label_smoothing":
        smoothing = Distribution.parse(SMOOTHING)
        return {"train.label_smoothing": smoothing, **config.space(with_teacher=False)}
    space = config.space(with_teacher=name != "cwtm")  # whose loss has neither T nor alpha
    if name in WITHOUT_TEMPERATURE:
        space.pop(TEMPERATURE, None)
    return space


def _points(config: Config, name: Control) -> Sequence[Point]:
    points = config.search.points or ()
    if name in ("label_smoothing", "cwtm"):
        return ()
    if name not in WITHOUT_TEMPERATURE:
        return points
    left = [{k: v for k, v in point.items() if k != TEMPERATURE} for point in points]
    return [point for n, point in enumerate(left) if point and point not in left[:n]]


def _row(
    run: Run,
    name: Control,
    point: Point,
    measured: Replicated,
    confirmations: Sequence[Confirmation],
) -> ControlResult:
    floor = run.terms.floor
    return ControlResult(
        **vars(measured),
        name=name,
        title=TITLES[name],
        first=contrast(measured, labels_only(run, confirmations, 1)[1], floor=floor),
        born_again=contrast(confirmations[1], measured, floor=floor),
        point=point,
    )


def _seeds(run: Run, results: Sequence[GenerationResult]) -> ControlResult:
    """Evaluate the ensemble of as many models on labels as there are generations."""
    count = len(results)
    arm = Arm(
        name="control_seeds",
        folder=run.folder.path / "controls" / "seeds",
        point=results[0].point,
        seeds=confirm_seeds(run.config, count),
    )
    (trials,) = run.replicate([arm], title=f"control: {count} seeds on labels")
    members = [arm.model(run, trial) for trial in trials]
    run.evaluate([Request(model) for model in members], title="testing the seeds")
    born_again: list[Model] = [result.models[0] for result in results]
    ensembles = [run.predicted(models) for models in (members, born_again[:1], born_again)]
    found = run.job("contrast", ensembles=ensembles)
    mean = Interval(**found["values"][0])
    first, last = (Interval(**row) for row in found["differences"][1:])
    return ControlResult(
        name="seeds",
        title=f"ensemble of {len(members)} seeds",
        seeds=(),
        metric=run.metric,
        values=(mean.value,),
        mean=mean,
        first=first,
        born_again=last.reversed(),
        models=count,
    )
