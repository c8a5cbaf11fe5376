"""What a run keeps of its teacher's soft targets: once, and only where logits are cached."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from engine import Count, Recorder, make_run

from selfkd.analysis.soft_targets import measure_targets
from selfkd.config import Config, load_config, to_tree
from selfkd.experiments.capacity import grow
from selfkd.experiments.ensemble import compress
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import TEACHER, RunFolder
from selfkd.experiments.study import compare_arms
from selfkd.results import TeacherTargets
from selfkd.soft_targets.store import open_store
from selfkd.storage.rows import load_row
from selfkd.tasks import make_task

TINY = [
    "data.train_size=100",
    "model={name: selfkd_mlp, args: {width: 8, depth: 1}}",
    "train={epochs: 1, batch_size: 20}",
    "search.trials=1",
]
STUDY = "study={arms: {labels: {}, student: {teacher: labels, set: {distill.temperature: 2}}}}"
RECIPES: dict[str, tuple[Any, list[str], str, str]] = {
    "generations": (
        born_again,
        ["rounds=2", "distill.teacher=lineage", "confirm.seeds=0"],
        *("generations 0 to 1", "generation 2"),
    ),
    "ensemble": (
        compress,
        ["members=3", "confirm.seeds=0"],
        *("the ensemble of 3 members", "the student"),
    ),
    "capacity": (
        grow,
        ["members=2", "confirm.seeds=1", "capacity.key=model.args.width", "capacity.values=[4, 8]"],
        *("the ensemble of 2 members", "the students"),
    ),
    "study": (compare_arms, ["confirm.seeds=2", STUDY], "labels", "arm student"),
}


def do(recipe: Any, config: Config, folder: RunFolder) -> tuple[Count, Recorder]:
    count, ear = Count(), Recorder()
    recipe(make_run(config, folder, count, ear))
    return count, ear


@pytest.mark.parametrize("command", RECIPES)
def test_a_run_keeps_what_its_teacher_knows(command: str, tmp_path: Path) -> None:
    recipe, settings, teacher, students = RECIPES[command]
    config = load_config(settings=[*TINY, *settings])
    folder = RunFolder.create(tmp_path / "run", config, command=command)
    count, _ = do(recipe, config, folder)
    found = load_row(TeacherTargets, folder.path / TEACHER)
    if command == "generations" and found.students == "generation 1":  # the better one
        teacher, students = "generation 0", "generation 1"
    assert (found.teacher, found.students) == (teacher, students)
    (job,) = (payload for kind, payload in count.jobs if kind == "teacher_targets")
    hashes = [row["hash"] for row in job["teachers"]]
    assert list(found.hashes) == hashes
    task = make_task(to_tree(config))
    manifest = task.manifest(hashes[0], {})
    stored = open_store(folder.path / "targets", hashes, data=manifest.data)
    expected = measure_targets(
        lambda items: stored(items, 0),
        task.labels("train"),
        classes=10,
        weights=None,
    )
    assert found.softness == expected.softness
    assert found.shares == expected.shares
    assert found.disagreement == expected.disagreement
    assert [row.item for row in found.seconds] == [row.item for row in expected.seconds]
    assert all(row.picture for row in found.seconds)
    assert found.names == tuple("0123456789")
    (folder.path / "summary.json").unlink()
    shutil.rmtree(folder.path / "targets")
    again, _ = do(recipe, config, folder)
    assert "teacher_targets" not in {kind for kind, _ in again.jobs}


def test_a_live_teacher_has_no_cached_logits(tmp_path: Path) -> None:
    settings = ["rounds=1", "confirm.seeds=0", "distill.live=true"]
    config = load_config(settings=[*TINY, *settings])
    folder = RunFolder.create(tmp_path / "run", config)
    count, _ = do(born_again, config, folder)
    assert "teacher_targets" not in {kind for kind, _ in count.jobs}
    assert not (folder.path / TEACHER).exists()


def test_a_fault_of_the_row_loses_no_run(tmp_path: Path) -> None:
    config = load_config(settings=[*TINY, "rounds=1", "confirm.seeds=0"])
    folder = RunFolder.create(tmp_path / "run", config)
    count, ear = Count(lambda kind, _: "no" if kind == "teacher_targets" else None), Recorder()
    summary = born_again(make_run(config, folder, count, ear))
    assert len(summary.generations) == 2
    assert any("no soft targets for the report" in note for note in ear.notes)
