"""The tables of a capacity curve and of a study, as the terminal and the page have them."""

from __future__ import annotations

import io
from typing import Any

from rich.console import Console

from selfkd.cli.terminal import print_rows
from selfkd.reporting.tables import Table, capacity_table, study_table
from selfkd.results import Curve, Study


def size(value: int, verdict: str, p: float | None) -> dict[str, Any]:
    ends = {"low": None, "high": None} if p is None else {"low": 0.9, "high": 0.92}
    gain = {"value": 0.01, "low": None if p is None else 0.005, "high": 0.015}
    arm = {"value": 0.91, "runs": [0.91], **ends}
    row = {"value": value, "parameters": 300 * value, "labels": arm, "taught": arm}
    return {**row, "difference": gain, "p_holm": p, "verdict": verdict}


def printed(table: Table) -> list[str]:
    output = io.StringIO()
    print_rows(Console(file=output, width=110), table.head, table.rows)
    return output.getvalue().splitlines()


def test_a_curve_s_fits_a_log_and_shows_what_has_no_interval() -> None:
    sizes = [size(2, "helps", 0.0002), size(8, "no evidence", 0.4), size(16, "unknown", None)]
    teacher = {"name": "teacher", "parameters": 120_000, "test_accuracy": 0.97}
    summary = {"key": "model.args.width", "seeds": 2, "sizes": sizes, "teacher": teacher}
    lines = printed(capacity_table(Curve.model_validate({**summary, "verdict": "helps"})))
    assert lines[1].split()[0] == "width"
    assert "< 0.001" in lines[3]
    assert "91.00% ± 1.00%" in lines[3]
    assert "+1.00 [+0.50, +1.50]" in lines[4]
    assert "0.400" in lines[4]
    assert "±" not in lines[5]
    assert any("120 k" in line and "97.00%" in line for line in lines)


def test_a_study_s_shows_what_has_no_interval_and_the_members() -> None:
    one: dict[str, Any] = {"value": 88.0, "low": None, "high": None}
    arm = {
        "name": "taught",
        "runs": [{"test_accuracy": 0.9912}],
        "errors": one,
        "mean": {"value": 0.9912, "low": 0.99, "high": 0.9924},
        "val_accuracy": 0.99,
        "agreement": {**one, "value": 0.995},
    }
    members = {"count": 2, "errors": 70, "test_accuracy": 0.993, "val_accuracy": 0.992}
    table = study_table(Study.model_validate({"arms": [arm], "members": members}))
    taught, teachers = (line for line in printed(table) if "9" in line)
    assert taught.split() == ["taught", "1", "88.0", "99.12%", "±", "0.12%", "99.00%", "99.50%"]
    assert teachers.split() == ["members", "(2)", "70", "99.30%", "99.20%"]
