"""Jobs in one process: what is known of one that fails."""

from __future__ import annotations

import gc
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from selfkd.errors import LONGEST
from selfkd.execution.jobs import (
    Batch,
    Beside,
    FailedJobError,
    InProcess,
    Job,
    load_entry,
    run_all,
)
from selfkd.results import Row


class SilentError(Exception):
    """Has no text at all."""

    def __str__(self) -> str:
        raise ZeroDivisionError


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (ValueError("too wide"), "ValueError: too wide"),
        (ValueError(" too wide\n"), "ValueError: too wide"),
        (ValueError(""), "ValueError"),
        (ValueError(" \n\t "), "ValueError"),
        (MemoryError(), "MemoryError"),
        (KeyError("key"), "KeyError: 'key'"),
        (SilentError(), "SilentError"),
        (ValueError("\ud800"), "ValueError: \\ud800"),
    ],
)
def test_the_error_of_a_job_is_one_text(error: Exception, text: str) -> None:
    assert failed(error) == text


def test_head_and_tail_of_a_long_error_are_kept() -> None:
    text = failed(ValueError(f"head {'x' * 5_000_000} tail"))
    assert text.startswith("ValueError: head xxx")
    assert text.endswith("xxx tail")
    assert "xxx … 4,998,0" in text
    assert len(text) < LONGEST + 50
    json.dumps(text)
    text.encode()


def test_jobs_beside_others_are_run_once_and_may_fail() -> None:
    begun = list[str]()

    def work(kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
        begun.append(kind)
        if kind == "broken" or (kind == "shaky" and begun.count("shaky") == 1):
            raise ValueError(kind)
        yield {"kind": kind}

    taken = list[tuple[str, str | None]]()
    beside = [
        Beside(Job(kind, {}), lambda done: taken.append((done.job.kind, done.error)))
        for kind in ("aside", "broken")
    ]
    jobs, executor = [Job("whole", {}), Job("shaky", {})], InProcess(work)
    rows = run_all(executor, jobs, beside=beside, attempts=2)
    assert rows == [{"kind": "whole"}, {"kind": "shaky"}]
    assert begun == ["whole", "shaky", "aside", "broken", "shaky"]
    assert taken == [("aside", None), ("broken", "ValueError: broken")]
    taken.clear()
    with pytest.raises(FailedJobError, match="broken"):
        run_all(executor, [Job("broken", {})], beside=beside[:1])
    assert run_all(executor, [], beside=beside[:1]) == []
    assert taken == [("aside", None)]


def failed(error: Exception) -> str:
    """Return the error of a job that raises one."""

    def work(kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
        yield {"epoch": 1}
        raise error

    batch = Batch([Job("train", {})])
    InProcess(work).run(batch)
    (outcome,) = batch.outcomes
    assert outcome.row == {"epoch": 1}
    assert outcome.error is not None
    return outcome.error


def test_what_the_function_of_jobs_imports_is_searched_for_garbage_by_no_worker(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "new_entry.py").write_text("def run(kind, payload):\n    yield {}\n")
    monkeypatch.syspath_prepend(tmp_path)
    gc.unfreeze()
    load_entry("new_entry:run")
    after_import = gc.get_freeze_count()
    gc.unfreeze()
    load_entry("new_entry:run")  # a rank's worker asks for it at each of its jobs
    assert (after_import > 0, gc.get_freeze_count()) == (True, 0)
