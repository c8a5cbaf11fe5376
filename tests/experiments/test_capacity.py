"""Students of growing size, in one process: what is trained, paired, measured, kept, refused."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import Count, Recorder, StopAfter, make_run, predictions, without_clock

from selfkd.budget import measured
from selfkd.config import Config, load_config
from selfkd.config.validate import check_capacity
from selfkd.data import load_data
from selfkd.errors import ConfigError
from selfkd.experiments.capacity import finished, grow
from selfkd.experiments.run_folder import RunFolder
from selfkd.response import read_stages
from selfkd.results import CapacitySummary, Row, TrialResult
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.rows import load_row
from selfkd.worker.jobs import run_job

TINY = [
    "model={name: selfkd_mlp, args: {width: 16, depth: 1}}",
    "train={epochs: 2, batch_size: 20}",
    "members=2",
    "capacity.values=[8, 2]",
    "confirm.seeds=2",
    "search.trials=2",
]


def start(folder: Path, *settings: str, name: str = "run") -> tuple[Config, RunFolder]:
    config = load_config(settings=[*TINY, *settings])
    check_capacity(config)
    return config, RunFolder.create(folder / name, config, command="capacity")


Done = tuple[CapacitySummary, RunFolder, Recorder, Count]


def run(folder: Path, *settings: str, name: str = "run", count: Count | None = None) -> Done:
    config, place = start(folder, *settings, name=name)
    ear, count = Recorder(), count or Count()
    return grow(make_run(config, place, count, ear)), place, ear, count


def best_of(folder: RunFolder, search: str, metric: str, sign: int) -> TrialResult:
    paths = (folder.path / search).glob("trial_*/result.json")
    trials = [load_row(TrialResult, path) for path in paths]
    return max(trials, key=lambda row: (sign * row.metrics[metric], -row.metrics["val_nll"]))


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return run(tmp_path_factory.mktemp("done"))


def test_teachers_then_all_students_on_paired_seeds(done: Done) -> None:
    _, _, ear, count = done
    assert [(title, trials) for title, trials, _ in ear.stages] == [
        ("members on labels", 2),
        ("students of 2 sizes, labels only and distilled, 2 seeds", 8),
    ]
    assert len(count.kinds("cache_teacher_logits")) == 2  # once, for all sizes
    students = count.kinds("train")[2:]
    assert [len(job["teachers"]) for job in students] == [0, 0, 2, 2] * 2
    assert [job["model"]["args"]["width"] for job in students] == [2] * 4 + [8] * 4
    seeds = [job["seed"] for job in students]
    assert seeds[:2] == seeds[2:4] == seeds[4:6] == seeds[6:]
    assert seeds[0] != seeds[1]
    assert {job["model"]["args"]["width"] for job in count.kinds("train")[:2]} == {16}


def test_sizes_come_smallest_first_with_their_parameters(done: Done) -> None:
    summary, *_ = done
    assert [(size.value, size.parameters) for size in summary.sizes] == [
        (2, 64 * 2 + 2 + 2 * 10 + 10),
        (8, 64 * 8 + 8 + 8 * 10 + 10),
    ]
    assert {(size.temperature, size.alpha) for size in summary.sizes} == {(3.5, 0.65)}


def test_the_figures_are_those_of_the_predictions(done: Done) -> None:
    summary, folder, _, _ = done
    labels = load_data("digits").test.labels.numpy()
    arms = ("labels_001", "distilled_001", "labels_000", "distilled_000")  # the smaller one first
    accuracy = []
    for arm in arms:
        for number in range(2):
            path = folder.path / "students" / arm / f"trial_00{number}" / "result.json"
            tensors, _ = load_tensors(predictions(folder, load_row(TrialResult, path).hash))
            accuracy.append(float((tensors["test"].numpy().argmax(1) == labels).mean()))
    small, large = summary.sizes
    assert small.labels.runs == pytest.approx(accuracy[:2])
    assert small.distilled.runs == pytest.approx(accuracy[2:4])
    assert large.distilled.runs == pytest.approx(accuracy[6:])
    gain = np.subtract(accuracy[6:], accuracy[4:6])
    assert large.difference.value == pytest.approx(gain.mean())


def test_the_summary_is_kept_and_the_best_taught_student_of_each_size(done: Done) -> None:
    summary, folder, _, _ = done
    assert load_row(CapacitySummary, folder.path / "summary.json") == summary
    left = folder.path.glob("students/*/*/*.safetensors")
    assert {folder.relative(path) for path in left} == {size.checkpoint for size in summary.sizes}
    for size in summary.sizes:
        path = (folder.path / size.checkpoint).with_name("result.json")
        trial = load_row(TrialResult, path)
        assert trial.teachers
        assert trial.point["model.args.width"] == size.value


def test_a_budget_is_made_of_it(done: Done) -> None:
    _, folder, _, _ = done
    found = measured(str(folder.path), value="8")
    assert (found["items"], found["trials"], found["teacher_ms"]) == (100, 1, 0.1)
    assert found["train_seconds"] > 0


@pytest.mark.parametrize("jobs", [1, 4, 9, 14, 18])
def test_a_resumed_run_ends_like_an_undisturbed_one(tmp_path: Path, done: Done, jobs: int) -> None:
    config, folder = start(tmp_path)
    first, again = Count(), Count()
    with pytest.raises(KeyboardInterrupt):
        grow(make_run(config, folder, StopAfter(first, jobs)))
    folder, config = RunFolder.open(folder.path)
    summary = grow(make_run(config, folder, again))
    found, expected = (
        replace(each, sizes=tuple(map(without_clock, each.sizes))) for each in (summary, done[0])
    )
    assert found == expected
    assert len(first.kinds("train")) + len(again.kinds("train")) == 10


def test_a_size_of_other_data_or_weights_than_at_its_start_is_refused(done: Done) -> None:
    def changed(kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
        for row in run_job(kind, payload):
            yield {"facts": row["facts"] | {"weights": {"/model": "abc"}}}

    folder, config = RunFolder.open(done[1].path)
    with pytest.raises(ConfigError, match=r"capacity.values 8: .*other data.*\n  weights: .*abc"):
        grow(make_run(config, folder, changed))


def test_t_and_alpha_may_be_searched_for_each_size(tmp_path: Path) -> None:
    space = "search.space={train.lr: {loguniform: [0.01, 0.1]}, distill.alpha: {uniform: [0, 1]}}"
    summary, folder, ear, count = run(
        tmp_path, "capacity.search=true", "confirm.seeds=1", space, "members=1"
    )
    assert [title for title, _, _ in ear.stages] == [
        "members on labels",
        "search for student 2 from labels only",
        "search for student 2 from the teachers",
        "search for student 8 from labels only",
        "search for student 8 from the teachers",
        "students of 2 sizes, labels only and distilled, 1 seed",
    ]
    students = [job for job in count.kinds("train") if job["stage"].startswith("distilled_")]
    for size, job in zip(summary.sizes, students, strict=True):
        point = best_of(folder, size.search, "val_accuracy", 1).point
        assert job["config"]["distill"]["alpha"] == point["distill.alpha"] == size.alpha
        assert job["config"]["train"]["lr"] == point["train.lr"]
        assert size.trials == 2
    stages, _ = read_stages(folder.path)
    assert [(stage.name, stage.parameters) for stage in stages] == [
        ("student 2", 160),
        ("student 8", 610),
    ]
    (only,) = summary.verdict.sentences
    assert only.endswith("over 1 fresh seed, too few for an interval")


def test_the_key_may_be_the_network_or_of_another_student(tmp_path: Path) -> None:
    summary, *_ = run(
        tmp_path,
        "student={name: selfkd_cnn, args: {width: 2}}",
        "capacity={key: student.name, values: [selfkd_cnn, selfkd_mlp]}",
        "members=1",
        "confirm.seeds=1",
        "train.epochs=1",
    )
    assert {size.value for size in summary.sizes} == {"selfkd_cnn", "selfkd_mlp"}


def test_a_pair_that_fails_is_left_out_and_told(tmp_path: Path) -> None:
    def second_of_the_small(kind: str, payload: Mapping[str, Any]) -> str | None:
        student = f"{payload.get('student')}"
        return "broken" if kind == "train" and "labels_001/trial_001" in student else None

    summary, _, ear, _ = run(tmp_path, "members=1", count=Count(second_of_the_small))
    assert ear.notes[0].startswith("1 of the 8 trials of the students of 2 sizes")
    assert ear.notes[1:] == ["only 1 of the 2 pairs of student 2 were trained"]
    assert [len(size.labels.runs) for size in summary.sizes] == [1, 2]
    assert summary.sizes[0].verdict == "unknown"


def test_a_size_without_a_pair_is_left_out_and_none_at_all_is_an_error(tmp_path: Path) -> None:
    def distilled(size: str, kind: str, payload: Mapping[str, Any]) -> str | None:
        return "broken" if kind == "train" and f"distilled_{size}" in payload["stage"] else None

    settings = ("members=1", "confirm.seeds=1")
    summary, *_ = run(tmp_path, *settings, count=Count(partial(distilled, "001")), name="one")
    assert [size.value for size in summary.sizes] == [8]
    with pytest.raises(RuntimeError, match="no pair of students could be trained"):
        run(tmp_path, *settings, count=Count(partial(distilled, "")))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["capacity.key=student.args.width"], r"capacity.key must begin with model\., as student"),
        (["student={name: selfkd_mlp}"], r"must begin with student\., as there is a student"),
        (["capacity.values=[4, 4]"], r"capacity.values must be different ones, got \[4, 4\]"),
        (
            ["search.space={model.args.width: {randint: [2, 4]}}"],
            "search.space must not hold capacity.key, got model.args.width in both",
        ),
        (["confirm.seeds=0"], "confirm.seeds must be at least 1, got 0"),
        (["train.init=teacher"], "train.init must be fresh for students of other sizes"),
        (["capacity={key: model.name, values: [1]}"], "capacity.values: model.name: must be"),
        (["capacity.values=[]"], "capacity.values: must be a list that is not empty"),
        (["capacity.key=train.lr"], "capacity.key: must match"),
    ],
)
def test_what_cannot_be_is_said_before_anything_starts(
    tmp_path: Path, settings: list[str], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        start(tmp_path, *settings)


def test_students_that_cannot_be_made_are_all_named_before_teachers_are_trained(
    tmp_path: Path,
) -> None:
    count = Count()
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, "capacity.values=[0, 4, wide]", count=count)
    first, second = str(caught.value).splitlines()
    assert first.startswith("capacity.values 0: ")
    assert "width must be at least 1, got 0" in first
    assert second.startswith("capacity.values wide: ")
    assert count.kinds("train") == []


@pytest.mark.parametrize("mode", ["min", "max"])
def test_the_metric_of_the_search_chooses(tmp_path: Path, mode: str) -> None:
    summary, folder, _, _ = run(
        *(tmp_path, "capacity.search=true", "confirm.seeds=1", "members=1", "search.trials=4"),
        *("search.metric=val_nll", f"search.mode={mode}", "train.epochs=6"),
    )
    for size in summary.sizes:
        best = best_of(folder, size.search, "val_nll", -1 if mode == "min" else 1)
        assert size.alpha == best.point["distill.alpha"]


def test_a_finished_run_takes_more_seeds(tmp_path: Path, done: Done) -> None:
    _, folder, _, _ = run(tmp_path, "confirm.seeds=1", name="few")
    _, config = RunFolder.open(folder.path)
    more, count = replace(config, confirm=replace(config.confirm, seeds=2)), Count()
    folder.check_change(config, more)
    assert finished(more, folder) is None
    found = grow(make_run(more, folder, count))
    assert len(count.kinds("train")) == 4
    timed = [[replace(size, train_seconds=0.0) for size in s.sizes] for s in (found, done[0])]
    assert timed[0] == timed[1]
    assert found.verdict == done[0].verdict
