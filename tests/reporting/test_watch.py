"""The report of a run that goes on: kept up to date, and never in the way."""

from __future__ import annotations

import json
import logging
import threading
import time
from pathlib import Path

import pytest
from run_folders import generations_run

from selfkd.cli import environment
from selfkd.reporting import page
from selfkd.reporting.watch import Reporter
from selfkd.tracking import NoTracker


def test_writes_after_a_generation_and_once_after_a_resume(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run", rounds=4, done=2)
    written: list[int] = []

    class Counted(Reporter):
        def write(self) -> None:
            written.append(1)
            super().write()

    reporter = Counted(path)
    reporter.generation_finished({"generation": 0})  # told again: generation 1 is done too
    reporter.generation_confirmed({"generation": 0})
    time.sleep(0.2)
    assert not written
    reporter.generation_finished({"generation": 1})
    deadline = time.monotonic() + 120
    while not (path / "report.html").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "unfinished" in (path / "report.html").read_text()
    reporter.finish()
    assert len(written) == 2


def test_a_report_that_has_not_begun_tells_all_that_happens_until_then(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run", rounds=4, done=2)
    begun, go_on = threading.Event(), threading.Event()
    written: list[int] = []

    class Slow(Reporter):
        def write(self) -> None:
            begun.set()
            go_on.wait(60)
            written.append(1)

    reporter = Slow(path)
    reporter.generation_finished({"generation": 1})
    assert begun.wait(60)
    for _ in range(5):  # the run goes on meanwhile
        reporter.generation_finished({"generation": 1})
    end = threading.Thread(target=reporter.finish)
    end.start()
    while not reporter._writer._shutdown:
        time.sleep(0.01)
    go_on.set()
    end.join(60)
    assert len(written) == 2


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), TypeError("odd")])
def test_a_failure_is_logged_and_stops_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
) -> None:
    path = generations_run(tmp_path / "run")

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(page, "save_text", fail)
    with caplog.at_level(logging.WARNING):
        reporter = Reporter(path)
        reporter.generation_finished({"generation": 2})
        reporter.finish()
    assert f"report.html was not written: {type(error).__name__}" in caplog.text
    assert not (path / "report.html").exists()


def test_a_failed_rewrite_leaves_the_last_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = generations_run(tmp_path / "run")
    Reporter(path).write()
    before = (path / "report.html").read_text()
    monkeypatch.setattr("os.replace", lambda *_: (_ for _ in ()).throw(OSError(5, "broken")))
    Reporter(path).write()
    assert (path / "report.html").read_text() == before
    assert not list(path.glob(".report.html.*"))


def test_hears_all_that_a_tracker_hears(tmp_path: Path) -> None:
    told = {name for name in vars(NoTracker) if not name.startswith("_")}
    assert told - {"close", "description"} <= set(dir(Reporter))


def test_every_start_is_written_down(tmp_path: Path) -> None:
    environment.record(tmp_path)
    environment.record(tmp_path)
    starts = json.loads((tmp_path / "environment.json").read_text())
    assert len(starts) == 2
    assert {"selfkd", "torch", "ray"} <= starts[0]["versions"].keys()
    assert time.strptime(starts[0]["started"][:19], "%Y-%m-%dT%H:%M:%S")
    assert starts[0]["cpu"]
    assert isinstance(starts[0]["gpus"], list)


def test_a_damaged_environment_is_begun_again(tmp_path: Path) -> None:
    (tmp_path / "environment.json").write_text("{")
    environment.record(tmp_path)
    assert len(json.loads((tmp_path / "environment.json").read_text())) == 1


def test_cards_are_named_as_nvidia_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "nvidia-smi"
    command.write_text("#!/bin/sh\necho 'NVIDIA H100'\necho 'NVIDIA H100'\n")
    command.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert environment.describe()["gpus"] == ["NVIDIA H100", "NVIDIA H100"]
    command.write_text("#!/bin/sh\nexit 9\n")
    assert environment.describe()["gpus"] == []
