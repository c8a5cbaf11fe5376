"""The report of a run that goes on: kept up to date, and never in the way."""

from __future__ import annotations

import logging
import threading
import time
from pathlib import Path

import pytest
from run_folders import generations_run

from selfkd.reporting import page
from selfkd.reporting.watch import Reporter, make_plots
from selfkd.results import (
    Confirmation,
    GenerationConfirmed,
    GenerationFinished,
    GenerationResult,
    GenerationsSummary,
    RunFinished,
)
from selfkd.storage.files import load_json
from selfkd.storage.rows import load_row


def finished(path: Path, generation: int) -> GenerationFinished:
    file = path / f"generation_{generation:03d}" / "result.json"
    return GenerationFinished(load_row(GenerationResult, file))


def confirmed(path: Path, generation: int) -> GenerationConfirmed:
    file = path / f"generation_{generation:03d}" / "confirmation.json"
    return GenerationConfirmed(load_row(Confirmation, file))


def test_writes_after_a_generation_and_once_after_a_resume(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run", rounds=4, done=2)
    written: list[int] = []

    class Counted(Reporter):
        def write(self) -> None:
            written.append(1)
            super().write()

    reporter = Counted(path)
    reporter(finished(path, 0))  # comes again: generation 1 is done too
    reporter(confirmed(path, 0))
    time.sleep(0.2)
    assert not written
    reporter(finished(path, 1))
    deadline = time.monotonic() + 600
    while not (path / "report.html").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert "unfinished" in (path / "report.html").read_text()
    reporter(finished(path, 1))  # at once again, before it has rested
    assert len(written) == 1
    reporter.finish()
    assert len(written) == 2


def test_a_report_that_has_not_begun_has_all_that_happens_until_then(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run", rounds=4, done=2)
    begun, go_on = threading.Event(), threading.Event()
    written: list[int] = []

    class Slow(Reporter):
        def write(self) -> None:
            begun.set()
            go_on.wait(60)
            written.append(1)

    reporter = Slow(path)
    reporter(finished(path, 1))
    assert begun.wait(60)
    for _ in range(5):  # the run goes on meanwhile
        reporter(finished(path, 1))
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
        reporter(finished(path, 2))
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


def test_a_finished_run_is_reported_once(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run")
    written: list[int] = []

    class Counted(Reporter):
        def write(self) -> None:
            written.append(1)

    reporter = Counted(path)
    reporter(RunFinished(load_row(GenerationsSummary, path / "summary.json")))
    reporter.finish()
    assert len(written) == 1


def test_the_time_of_a_start_is_kept_with_each_report(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run")
    reporter = Reporter(path)
    for seconds in (700.0, 7200.0):
        reporter._begun = time.monotonic() - seconds
        reporter.write()
        (start,) = load_json(path / "environment.json")
        assert seconds <= start["seconds"] < seconds + 60
    assert "2 h 0 min" in (path / "report.html").read_text()


def test_plots_are_pages_of_their_own(tmp_path: Path) -> None:
    plots = make_plots(generations_run(tmp_path / "run"))
    names = ["test_accuracy_over_generation_0", "temperature_and_alpha", "each_trial_by_generation"]
    assert list(plots) == names
    for text in plots.values():
        assert text.startswith("<!doctype html>")
        assert text.count("</svg>") > 0
        assert "<script" not in text


def test_no_plots_of_what_cannot_be_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert make_plots(tmp_path) == {}
    assert "no plots of" in caplog.text
