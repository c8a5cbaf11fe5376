"""The tables of runs, as the terminal and the page have them."""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console

from selfkd.cli.terminal import print_table
from selfkd.reporting.read import Generation, Run
from selfkd.reporting.tables import (
    Table,
    capacity_table,
    ensemble_table,
    generations_table,
    study_table,
)
from selfkd.results import (
    ArmResult,
    ArmRun,
    CapacitySummary,
    Evaluation,
    GenerationResult,
    Interval,
    MembersRow,
    Seeds,
    Size,
    StudySummary,
    TableRow,
    TeacherRow,
    Verdict,
)

TESTED = {"val_accuracy": 0.9, "test_accuracy": 0.8125, "test_nll": 0.5, "test_ece": 0.01}


def printed(table: Table, width: int = 110) -> list[str]:
    output = io.StringIO()
    print_table(Console(file=output, width=width), table)
    return output.getvalue().splitlines()


def test_an_ensemble_s_has_quality_and_costs_of_each_row() -> None:
    costs = {"parameters": 24_058, "ms_1": 0.4123, "ms_128": 0.0212}
    rows = [
        TableRow(name="ensemble of 3, logits", metrics=TESTED, **costs),
        TableRow(name="student, labels only", metrics=TESTED, low=0.80, high=0.83, **costs),
        TableRow(name="student, from its teacher", metrics=TESTED),
    ]
    table = ensemble_table(rows)
    assert table.rules == (1,)  # above the two students
    assert [" ".join(line.split()) for line in printed(table) if "%" in line] == [
        "ensemble of 3, logits 90.00% 81.25% 0.5000 0.0100 24.1 k 0.412 0.0212",
        "student, labels only 90.00% 81.25% ± 1.50% 0.5000 0.0100 24.1 k 0.412 0.0212",
        "student, from its teacher 90.00% 81.25% 0.5000 0.0100",
    ]


def test_the_ensemble_of_generations_has_the_metric_that_they_are_chosen_by() -> None:
    metrics = {**TESTED, "val_nll": 0.25}
    chosen = GenerationResult(generation=0, trial=0, metrics=metrics)
    run = Run(
        Path("run"),
        "generations",
        {"search": {"metric": "val_nll"}},
        None,
        generations=(Generation(0, (), chosen),),
        ensemble=Evaluation(hash="", metrics={**metrics, "val_nll": 0.125}),
    )
    table = generations_table(run)
    column = [row[table.head.index("val NLL")] for row in table.rows]
    assert column == ["0.2500", "0.1250"]


def size(value: int, verdict: str, p: float | None) -> Size:
    low, high = (None, None) if p is None else (0.9, 0.92)
    seeds = Seeds(value=0.91, low=low, high=high, runs=(0.91,))
    gain = Interval(0.01) if p is None else Interval(0.01, 0.005, 0.015)
    return Size(
        value=value,
        parameters=300 * value,
        labels=seeds,
        distilled=seeds,
        difference=gain,
        room=gain,
        p_holm=p,
        verdict=verdict,
    )


def test_a_capacity_curve_s_fits_a_log_and_shows_what_has_no_interval() -> None:
    summary = CapacitySummary(
        key="model.args.width",
        seeds=2,
        sizes=(size(2, "helps", 0.0002), size(8, "no evidence", 0.4), size(16, "unknown", None)),
        teacher=TeacherRow(
            source="members", members=5, parameters=120_000, metrics={"test_accuracy": 0.97}
        ),
        verdict=Verdict(name="students", to="labels"),
    )
    lines = printed(capacity_table(summary))
    assert lines[1].split()[0] == "width"
    assert "< 0.001" in lines[3]
    assert "91.00% ± 1.00%" in lines[3]
    assert "+1.00 [+0.50, +1.50]" in lines[4]
    assert "0.400" in lines[4]
    assert "±" not in lines[5]
    assert any("120 k" in line and "97.00%" in line for line in lines)


def test_a_study_s_shows_what_has_no_interval_and_the_members() -> None:
    arm = ArmResult(
        name="distilled",
        runs=(ArmRun(number=0, seed=0, metrics={"test_accuracy": 0.9912}),),
        errors=Interval(88.0),
        mean=Interval(0.9912, 0.99, 0.9924),
        metrics={"val_accuracy": 0.99},
        agreement=Interval(0.995),
    )
    members = MembersRow(
        count=2, metrics={"test_errors": 70, "test_accuracy": 0.993, "val_accuracy": 0.992}
    )
    summary = StudySummary(items=9, seeds=1, arms=(arm,), members=members)
    distilled, teachers = (line for line in printed(study_table(summary)) if "9" in line)
    assert distilled.split() == [
        *("distilled", "1", "88.0", "99.12%", "±", "0.12%", "99.00%", "99.50%")
    ]
    assert teachers.split() == ["members", "(2)", "70", "99.30%", "99.20%"]
