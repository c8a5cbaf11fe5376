"""Inside a Ray job: what a command refuses there. And how a command is stopped before Ray is up."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
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


def test_a_working_folder_that_was_removed_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert generations.main(["--plan"]) == 2
    assert capsys.readouterr().err.startswith("error: the working folder must be there, got one")


def test_a_name_that_a_locale_has_not_read_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert generations.main(["--name", "\udcc3\udca9", "--plan"]) == 2  # of é in ASCII
    assert capsys.readouterr().err.rstrip().endswith(": set PYTHONUTF8=1")


def test_outside_a_job_relative_paths_are_relative_to_the_user(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("RAY_JOB_CONFIG_JSON_ENV_VAR", raising=False)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").touch()
    assert generations.main([]) == 2
    assert "must be writable" in capsys.readouterr().err


def train_fn(trial: object) -> None:
    """Never called."""


@pytest.fixture
def terminated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Where runs lie that get SIGTERM while they look for a cluster."""

    @contextlib.contextmanager
    def connect(*, verbose: bool, stuck: object) -> Iterator[bool]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield False

    def leave_now(code: int) -> None:
        raise SystemExit(code)

    monkeypatch.setattr("selfkd.execution.cluster.connect", connect)
    monkeypatch.setattr("selfkd.cli.command.leave_now", leave_now)
    monkeypatch.chdir(tmp_path)
    return tmp_path / "runs" / "a"


def exit_code(*words: str) -> object:
    with pytest.raises(SystemExit) as leaving:
        generations.main([*words])
    return leaving.value.code


def test_a_run_that_is_terminated_before_ray_is_up_can_be_continued(
    terminated: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert exit_code("--name", "a", "--set", "tracking=none") == 130
    assert signal.getsignal(signal.SIGTERM) == before
    assert f"python -m selfkd.generations --resume {terminated}" in capsys.readouterr().out


def test_a_relative_data_root_is_kept_absolute(terminated: Path) -> None:
    """Workers have folders of their own: what the user names is relative to the user's."""
    settings = ["data.name=folder", "data.root=images", "tracking=none"]
    words = [word for setting in settings for word in ("--set", setting)]
    assert exit_code("--name", "a", *words) == 130
    assert f"root: {terminated.parents[1] / 'images'}\n" in (terminated / "config.yaml").read_text()


def test_python_callers_get_an_interrupt_and_their_own_handler_back(
    terminated: Path,
) -> None:
    def mine(*_: object) -> None:
        raise AssertionError

    before = signal.signal(signal.SIGTERM, mine)
    try:
        with pytest.raises(KeyboardInterrupt):
            generations.run_generations(train_fn, name="a", settings=["tracking=none"])
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.slow  # as above, but for the real Ray, which has handlers of its own while it starts
@pytest.mark.parametrize("seconds", [0.0, 2.0, 4.0])
def test_a_process_that_is_terminated_early(tmp_path: Path, seconds: float) -> None:
    command = [sys.executable, "-m", "selfkd.generations", "--name", "a", "--set", "tracking=none"]
    process = subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    while not (tmp_path / "runs" / "a" / "config.yaml").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(seconds)
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=600)
    assert process.returncode == 130, printed
    assert f"--resume {tmp_path}/runs/a" in printed
    assert "Traceback" not in printed
