"""A file that was cut short: named, or made again; never used."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from drive import Driver
from record import record
from test_killed_driver import SETTINGS


@pytest.fixture(scope="module")
def stages(driver: Driver, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run as it was at several moments, and its end."""
    here = tmp_path_factory.mktemp("stages")
    moments = {
        "between trials": "^TrialFinished generation-0 0",
        "before the choice": "writing generation_000/student",
        "while caching": "^TaskProgressed written",
        "distilled": "^TrialFinished generation-1 0",
        "before the ensemble": "doing average",
    }
    stages = {}
    for name, moment in moments.items():
        stages[name] = here / name / "run"
        assert driver.run(stages[name], SETTINGS, die=moment)[0] != 0
    stages["end"] = here / "end" / "run"
    assert driver.run(stages["end"], SETTINGS) == (0, "")
    return stages


def cut(folder: Path, pattern: str) -> Path:
    """Leave half of a file, as a disk does that lost power."""
    path = sorted(folder.glob(pattern))[0]
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    return path


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("between trials", "generation_000/trial_000/result.json"),
        ("distilled", "generation_000/result.json"),
        ("distilled", "data.json"),
    ],
)
def test_a_damaged_row_is_named_and_removing_it_is_enough(
    driver: Driver, stages: dict[str, Path], tmp_path: Path, stage: str, file: str
) -> None:
    folder = shutil.copytree(stages[stage], tmp_path / "run")
    path = cut(folder, file)
    code, error = driver.run(folder, SETTINGS)
    assert code == 1
    assert f"{path} is damaged" in error
    assert "remove it and resume" in error
    path.unlink()
    assert driver.run(folder, SETTINGS) == (0, "")
    assert record(folder) == record(stages["end"])


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("while caching", "targets/*/*/view_*/shard_00000.safetensors"),
        ("distilled", "targets/*/*/view_*/shard_00001.safetensors"),
        ("between trials", "generation_000/trial_001/student.safetensors"),
    ],
    ids=["shard, while caching", "shard, while its students train", "student without result"],
)
def test_what_can_be_made_again_is(
    driver: Driver, stages: dict[str, Path], tmp_path: Path, stage: str, file: str
) -> None:
    folder = shutil.copytree(stages[stage], tmp_path / "run")
    if not list(folder.glob(file)):  # as of a worker that was killed while it wrote
        (folder / file).parent.mkdir(exist_ok=True)
        shutil.copyfile(folder / "generation_000/trial_000/student.safetensors", folder / file)
    path = cut(folder, file)
    half = path.stat().st_size
    assert driver.run(folder, SETTINGS) == (0, "")
    assert record(folder) == record(stages["end"])
    assert not path.exists() or path.stat().st_size > half


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("before the choice", "generation_000/trial_*/student.safetensors"),
        ("while caching", "generation_000/student.safetensors"),
        ("distilled", "generation_000/student.safetensors"),
        ("before the ensemble", "predictions/*.safetensors"),
    ],
    ids=["student of a done trial", "teacher, caching", "teacher, training", "predictions"],
)
def test_a_damaged_model_is_named(
    driver: Driver, stages: dict[str, Path], tmp_path: Path, stage: str, file: str
) -> None:
    folder = shutil.copytree(stages[stage], tmp_path / "run")
    damaged = [cut(path.parent, path.name) for path in folder.glob(file)]
    code, error = driver.run(folder, SETTINGS)
    assert code == 1
    names = [str(path) for path in damaged]
    names += [name.replace("trial_000/", "").replace("trial_001/", "") for name in names]  # linked
    assert any(f"{name} is damaged" in error for name in names), error
    assert not (folder / "summary.json").exists()
