"""The figures of a capacity curve and of a study of a task by NLL."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import DATA, capacity_run, study_run

from selfkd.reporting.page import write_report
from selfkd.reporting.read import read_run
from selfkd.reporting.tables import results_table
from selfkd.storage.rows import save_row


@pytest.mark.parametrize(
    ("make", "head", "words"),
    [
        (
            capacity_run,
            ("labels only", "distilled", "difference, nats"),
            ("NLL over parameters", "0.8000 and 0.8300", "+0.030 [+0.010, +0.050]"),
        ),
        (
            study_run,
            ("test errors", "test NLL", "agreement"),
            ("NLL on test with 95 % intervals", "labels 0.9300; distilled 0.9500."),
        ),
    ],
)
def test_a_report_is_of_nll(
    make: Callable[[Path], Path], head: tuple[str, ...], words: tuple[str, ...], tmp_path: Path
) -> None:
    path = make(tmp_path / "run")
    save_row(path / "data.json", replace(DATA, metric="nll", mode="min"))
    found = results_table(read_run(path)).head
    assert [name for name in found if name in head] == list(head)
    report = write_report(path).read_text()
    for text in words:
        assert text in report
    assert "Accuracy" not in report.replace("&#39;", "'").split("<footer")[0]
