"""The tables of runs, as the terminal and the page have them."""

from __future__ import annotations

import io
import re
from dataclasses import replace

from rich.console import Console

from selfkd.cli.terminal import print_table
from selfkd.reporting.tables import (
    Table,
    capacity_table,
    confirmation_table,
    ensemble_table,
    own_metrics_table,
    printed_table,
    study_table,
)
from selfkd.results import (
    ArmResult,
    ArmRun,
    CapacitySummary,
    Confirmation,
    ControlResult,
    Evaluation,
    GenerationResult,
    GenerationsSummary,
    Interval,
    McNemar,
    MembersRow,
    Seeds,
    Size,
    StudySummary,
    TableRow,
    TeacherRow,
    Verdict,
)

TESTED = {"val_accuracy": 0.9, "test_accuracy": 0.8125, "test_nll": 0.5, "test_ece": 0.01}
RESULT = GenerationResult(
    generation=1,
    trial=0,
    temperature=4.0,
    alpha=0.5,
    metrics={**TESTED, "agreement": 0.75},
    seconds=3.0,
)


def printed(table: Table, width: int = 110) -> list[str]:
    output = io.StringIO()
    print_table(Console(file=output, width=width), table)
    return output.getvalue().splitlines()


def cells(table: Table, pattern: str, width: int = 80) -> list[list[str]]:
    """The words of the printed lines that have a pattern."""
    return [line.split() for line in printed(table, width) if re.search(pattern, line)]


def test_a_row_is_a_generation_and_the_ensemble_is_last() -> None:
    first = replace(RESULT, generation=0, temperature=None, alpha=None, metrics=TESTED)
    ensemble = Evaluation(hash="", metrics={**TESTED, "test_accuracy": 0.99})
    summary = GenerationsSummary(generations=(first, RESULT), ensemble=ensemble)
    assert cells(printed_table(summary), r"%|NLL") == [
        "generation T alpha val acc test acc NLL ECE agreement seconds".split(),  # noqa: SIM905
        ["0", "90.00%", "81.25%", "0.5000", "0.0100", "3.0"],
        ["1", "4.00", "0.50", "90.00%", "81.25%", "0.5000", "0.0100", "75.00%", "3.0"],
        ["ensemble", "90.00%", "99.00%", "0.5000", "0.0100"],
    ]


def test_the_metrics_of_a_users_own_training_function_are_columns() -> None:
    first = replace(RESULT, generation=0, temperature=None, alpha=None, metrics={"f1": 0.5})
    last = replace(RESULT, metrics={"loss": 12.34567, "f1": 0.75})
    assert cells(own_metrics_table([first, last], "f1"), r"\d") == [
        ["generation", "T", "alpha", "f1", "loss", "seconds"],
        ["0", "0.5", "3.0"],
        ["1", "4.00", "0.50", "0.75", "12.35", "3.0"],
    ]


def confirmation(generation: int, *, metric: str = "test_accuracy") -> Confirmation:
    later = generation > 0
    return Confirmation(
        generation=generation,
        seeds=(1, 2, 3),
        metric=metric,
        values=(0.95, 0.96, 0.97),
        mean=Interval(0.9593, 0.9545, 0.9641),
        first=Interval(0.0064, -0.0109, 0.0237) if later else None,
        previous=Interval(-0.0008) if later else None,
        mcnemar=McNemar(only_student=3, only_teacher=1, p=0.625) if later else None,
    )


def test_the_confirmation_has_means_and_paired_differences_in_80_columns() -> None:
    control = ControlResult(
        name="ensemble",
        title="ensemble of 11 seeds",
        seeds=(1, 2, 3),
        metric="test_accuracy",
        values=(),
        mean=Interval(0.9593, 0.95, 0.97),
        first=Interval(-0.1064, -0.1209, -0.0937),
    )
    summary = GenerationsSummary(
        generations=(), confirmations=(confirmation(0), confirmation(10)), controls=(control,)
    )
    lines = printed(confirmation_table(summary), width=80)
    assert max(len(line) for line in lines) <= 80
    assert [" ".join(line.split()) for line in lines if re.search(r"\d", line)] == [
        "3 fresh seeds mean test acc vs generation 0 vs previous McNemar",
        "generation 0 95.93% ± 0.48%",
        "generation 10 95.93% ± 0.48% +0.64% ± 1.73% -0.08% 0.62",
        "ensemble of 11 seeds 95.93% ± 1.07% -10.64% ± 1.45%",
    ]


def test_a_metric_that_is_no_accuracy_is_shown_as_it_is() -> None:
    loss = replace(confirmation(0, metric="loss"), mean=Interval(4.5, 4.25, 4.75))
    table = confirmation_table(GenerationsSummary(generations=(), confirmations=(loss,)))
    text = "\n".join(printed(table))
    assert "mean loss" in text
    assert "4.5 ± 0.25" in text


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
