"""Inside a Ray job: what a command refuses there."""

from __future__ import annotations

from pathlib import Path

import pytest

from selfkd import ensemble, generations

LOST = "must be absolute (or a URI) in a Ray job, whose own folder is removed with it, got"


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A job's own folder, as its driver sees it."""
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "faults"),
    [
        ([], [f"storage: {LOST} 'runs': --set storage=/shared/runs"]),
        (["--set", "storage=a/b"], [f"storage: {LOST} 'a/b'"]),
        (["--resume", "runs/a"], [f"--resume: {LOST} 'runs/a'"]),
        (
            ["--set", "data.root=images", "--set", "targets.root=kept"],
            ["storage: ", f"data.root: {LOST} 'images'", f"targets.root: {LOST} 'kept'"],
        ),
    ],
)
def test_what_would_be_lost_with_the_job_is_refused(
    job: Path, arguments: list[str], faults: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert generations.main(arguments) == 2
    error = capsys.readouterr().err
    for fault in faults:
        assert fault in error
    assert list(job.iterdir()) == []


def test_the_environments_data_and_runs_of_members_too(
    job: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SELFKD_DATA", "data")
    arguments = ["--from", "runs/a", "--from", "runs/b", "--set", "storage=/dev/null"]
    assert ensemble.main(arguments) == 2
    error = capsys.readouterr().err
    for fault in (f"SELFKD_DATA: {LOST} 'data'", "--from: ", "'runs/a'", "'runs/b'"):
        assert fault in error


def test_an_absolute_storage_is_not(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It gets as far as the next check, which this file fails."""
    (job / "file").touch()
    assert generations.main(["--set", f"storage={job}/file"]) == 2
    assert "must be writable" in capsys.readouterr().err


def test_outside_a_job_relative_paths_are_relative_to_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    assert generations.main([]) == 2
    assert "must be writable" in capsys.readouterr().err
