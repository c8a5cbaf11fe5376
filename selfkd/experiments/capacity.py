"""Students of growing size, the same teachers: where distillation helps.

Cho, Hariharan, "On the Efficacy of Knowledge Distillation", 2019,
https://arxiv.org/abs/1910.01348 (students that are too small to follow their teacher)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from selfkd.analysis.capacity import compare_size, describe_curve, judge_sizes
from selfkd.analysis.verdicts import count
from selfkd.config import Config
from selfkd.errors import ConfigError
from selfkd.experiments.arms import Arm, Request, Run
from selfkd.experiments.arms import Teachers as ArmTeachers
from selfkd.experiments.ensemble import Pair, pair
from selfkd.experiments.members import Teachers, make_teachers, trained_networks
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.stages import trial_seed
from selfkd.experiments.teacher_row import keep_members
from selfkd.results import (
    TIE,
    CapacitySummary,
    Message,
    Model,
    Point,
    Row,
    SearchesOfSizes,
    SearchOfSize,
    Size,
    TrialResult,
)
from selfkd.storage.files import remove_file
from selfkd.storage.rows import save_row

DISTILL = ("distill.temperature", "distill.alpha")


@dataclass(frozen=True)
class _Student:
    """A student of one size: how it is trained from labels only, and distilled."""

    value: int | float | str
    parameters: int
    labels: Arm
    distilled: Arm
    search: str
    """Folder of its search."""


def grow(run: Run) -> CapacitySummary:
    """Train students of each size from labels only and from the teachers; what is done is kept.

    Both are trained on the same fresh seeds (`confirm.seeds`), each size on the same ones. The
    intervals are over these seeds, for these teachers and this test split.

    Returns:
        The summary, which is saved as `summary.json`, the smallest size first.

    Raises:
        ConfigError: The data, the models or the members are not as the config says.
        RunError: All trials of a stage failed.
    """
    config = run.config
    sizes = _sizes(run)
    teachers = make_teachers(run)
    students = [_student(run, *size, teachers) for size in sizes]
    arms = [arm for student in students for arm in (student.labels, student.distilled)]
    seeds = count(config.confirm.seeds, "seed")
    title = f"students of {len(students)} sizes, labels only and distilled, {seeds}"
    trials = run.replicate(arms, title=title, each=False)
    keep_members(run, teachers.of(config), config=config, students="the students")
    summary = _measure(run, teachers, students, trials)
    run.finish(summary)
    kept = {size.checkpoint for size in summary.sizes}
    for arm, rows in zip(arms, trials, strict=True):
        for trial in rows:
            if (model := arm.model(run, trial)).checkpoint not in kept:
                remove_file(run.folder.file(model.checkpoint))
    return summary


def finished(config: Config, folder: RunFolder) -> CapacitySummary | None:
    """Return the summary of a run that has nothing left to do, else None."""
    summary = folder.summary(CapacitySummary)
    return summary if summary and summary.seeds >= config.confirm.seeds else None


def _sizes(run: Run) -> list[tuple[int | float | str, int, str]]:
    """Try every student; return value, parameters and name of each, the smallest first."""
    capacity, sizes, faults = run.config.capacity, [], []
    for number, value in enumerate(capacity.values):
        try:
            own = run.config.at({capacity.key: value})
            facts = run.check(own, teachers=trained_networks(run.config))
        except ConfigError as error:
            faults.append(f"capacity.values {value}: {error}")
            continue
        where = f"capacity.values {value}: "
        run.folder.keep_facts(f"search_{number:03d}/data.json", facts, where=where)
        sizes.append((value, facts.parameters["student"], f"{number:03d}"))
    if faults:
        raise ConfigError("\n".join(faults))
    sizes.sort(key=lambda size: size[1])
    rows = tuple(
        SearchOfSize(value=value, parameters=parameters, search=f"search_{name}")
        for value, parameters, name in sizes
    )
    save_row(run.folder.path / "students.json", SearchesOfSizes(key=capacity.key, students=rows))
    return sizes


def _student(
    run: Run, value: int | float | str, parameters: int, name: str, teachers: Teachers
) -> _Student:
    """Return a size with its settings, searched on validation with `capacity.search`."""
    config, distill = run.config, run.config.distill
    size: Point = {config.capacity.key: value}
    fixed = dict(zip(DISTILL, (distill.temperature, distill.alpha), strict=True))
    if distill.mode == "traces":
        fixed = {}

    def arm(kind: str, point: Point, search: str, source: str, teach: ArmTeachers) -> Arm:
        space = config.space(with_teacher=kind == "distilled") if config.capacity.search else {}
        own = Arm(
            name=search,
            title=f"search for student {value} from {source}",
            folder=run.folder.path / search,
            point=point,
            teachers=teach,
            space=space,
            points=config.search.points or () if kind == "distilled" else (),
        )
        return replace(
            own,
            name=f"{kind}_{name}",
            folder=run.folder.path / "students" / f"{kind}_{name}",
            point=run.search(own).best.point if space else point,
            seeds=[trial_seed(config.seed, "capacity", n) for n in range(config.confirm.seeds)],
        )

    return _Student(
        value,
        parameters,
        arm("labels", size, f"labels_search_{name}", "labels only", lambda own, number: ()),
        arm("distilled", {**size, **fixed}, f"search_{name}", "the teachers", teachers.of),
        f"search_{name}",
    )


def _measure(
    run: Run,
    teachers: Teachers,
    students: Sequence[_Student],
    trials: Sequence[Sequence[TrialResult]],
) -> CapacitySummary:
    config, metric, terms = run.config, run.metric, run.terms
    own_teachers = teachers.of(config)
    pairs: list[list[Pair]] = []
    for student, alone, distilled in zip(students, trials[::2], trials[1::2], strict=True):
        pairs.append(pair(run, (student.labels, student.distilled), (alone, distilled)))
        if (found := len(pairs[-1])) < config.confirm.seeds:
            said = f"{found} of the {config.confirm.seeds} pairs of student {student.value}"
            run.events(Message(f"only {said} were trained"))
    models = [model for of_size in pairs for both in of_size for model in both]
    requests = [Request(model) for model in (*own_teachers, *models)]
    title = "measuring on the test split"
    by_hash = {row.hash: row for row in run.evaluate(requests, title=title)}
    (teacher,) = run.average([(own_teachers, config.distill.average)])
    of_trials = {t.hash: t for rows in trials for t in rows}
    trained = [[(m, of_trials[m.hash]) for _, m in of_size] for of_size in pairs if of_size]
    best = [_best(run, students) for students in trained]
    cost, *costs = run.time([own_teachers, *([model] for model in best)])
    sizes: list[Size] = []
    for student, of_size in zip(students, pairs, strict=True):
        if of_size:
            labels = [by_hash[model.hash] for model, _ in of_size]
            from_teachers = [by_hash[model.hash] for _, model in of_size]
            size = compare_size(
                labels, from_teachers, teacher.metrics[metric], metric=metric, terms=terms
            )
            number = len(sizes)
            own = [trial for _, trial in trained[number]]
            sizes.append(_size(run, student, size, own, best[number], costs[number]))
    if not sizes:
        raise RuntimeError("no pair of students could be trained on one seed")
    seeds = [[of_trials[m.hash].seed for _, m in of_size] for of_size in pairs if of_size]
    sizes, verdict = judge_sizes(sizes, seeds, terms=terms)
    return CapacitySummary(
        key=config.capacity.key,
        seeds=config.confirm.seeds,
        searched=config.capacity.search,
        trials=config.search.trials if config.capacity.search else 0,
        teacher=teachers.row(config, teacher, cost),
        sizes=tuple(sizes),
        verdict=verdict,
        said=tuple(describe_curve(sizes, mode=run.mode)),
    )


def _best(run: Run, trained: Sequence[tuple[Model, TrialResult]]) -> Model:
    """Return the best student on validation, which is kept."""
    search = run.config.search
    sign = 1 if search.mode == "max" else -1
    best, _ = max(
        trained,
        key=lambda own: (sign * own[1].metrics[search.metric], -own[1].metrics.get(TIE, 0.0)),
    )
    return best


def _size(
    run: Run,
    student: _Student,
    size: Size,
    trained: Sequence[TrialResult],
    best: Model,
    cost: Row,
) -> Size:
    """Return a size with what it costs to run, took to train, and where its best student lies."""
    searched = run.config.capacity.search
    trials = run.config.search.trials if searched else 1
    seconds = sum(trial.train_seconds for trial in trained) / len(trained)
    own = run.config.at(student.distilled.point).distill
    return replace(
        size,
        value=student.value,
        parameters=student.parameters,
        temperature=own.temperature if own.mode == "tokens" else None,
        alpha=own.alpha if own.mode == "tokens" else None,
        trials=trials,
        train_seconds=trials * seconds,
        ms_1=cost["ms_1"],
        ms_128=cost["ms_128"],
        checkpoint=best.checkpoint,
        search=student.search if searched else "",
    )
