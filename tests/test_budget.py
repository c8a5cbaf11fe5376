"""What distilling costs and saves: by hand, from a run, and what cannot be."""

from __future__ import annotations

import io
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from selfkd.budget import Budget, budget, describe_budget, main, make_budget_table, measured
from selfkd.config import load_config
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import (
    CapacitySummary,
    Chosen,
    EnsembleSummary,
    Facts,
    GenerationResult,
    GenerationsSummary,
    Interval,
    Seeds,
    Size,
    TableRow,
    TeacherRow,
    TrialResult,
    Verdict,
)
from selfkd.storage.rows import save_row

SIZES = ["--teacher-params", "70", "--student-params", "7"]
TOKENS = ["--teacher", "10", "--student", "0.5", "--per", "1e6", "--items", "1e9"]


def test_a_billion_tokens_at_ten_and_a_half_a_million() -> None:
    plan = budget(teacher=10, student=0.5, per=1e6, items=1e9, training=1000)
    assert plan.caching == pytest.approx(10_000)
    assert plan.distilling == pytest.approx(11_000)
    assert plan.saving == pytest.approx(9.5e-6)
    assert plan.break_even == pytest.approx(11_000 / 9.5e-6)
    assert plan.break_even == pytest.approx(1.16e9, rel=0.005)
    assert describe_budget(plan, unit="token") == (
        "distilling costs 11,000 and has paid for itself after 1.16 billion served tokens"
    )


@pytest.mark.parametrize("volume", [1e8, 1157894736.8421052, 1e10])
def test_at_the_break_even_nothing_is_left_and_beyond_it_the_saving(volume: float) -> None:
    plan = budget(teacher=10, student=0.5, per=1e6, items=1e9, training=1000, volume=volume)
    assert plan.net == pytest.approx(volume * 10e-6 - volume * 0.5e-6 - 11_000, abs=1e-3)
    by_teacher, by_student = volume * plan.teacher_cost, volume * plan.student_cost
    assert plan.net == pytest.approx(by_teacher - (plan.distilling + by_student), abs=1e-3)


def test_training_is_computed_from_epochs_and_trials() -> None:
    plan = budget(teacher=2, student=0.1, items=1000, epochs=20, trials=8)
    assert plan.training == pytest.approx(8 * 20 * 1000 * 3 * 0.1)
    assert plan.caching == 2000  # once, however many trials read the cached logits


def test_the_teacher_runs_on_every_view_once() -> None:
    plan = budget(teacher=2, student=0.1, items=1000, views=8, training=0)
    assert plan.distilling == plan.caching == 16_000


@pytest.mark.parametrize(("student", "word"), [(2.0, "as dear as"), (3.0, "dearer than")])
def test_a_student_that_saves_nothing_never_pays(student: float, word: str) -> None:
    plan = budget(teacher=2, student=student, items=1000, training=5, volume=10)
    assert plan.break_even is None
    assert f"the student is {word} the teacher, there is no break-even" in describe_budget(plan)
    assert plan.net is not None
    assert plan.net < 0


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
@pytest.mark.parametrize(
    "name", ["teacher", "student", "items", "per", "views", "trials", "epochs", "volume"]
)
def test_figures_must_be_above_0(name: str, value: float) -> None:
    given: dict[str, Any] = {"teacher": 2, "student": 1, "items": 9, "epochs": 1, name: value}
    with pytest.raises(ValueError, match=f"^{name} must be a finite number above 0, got {value}"):
        budget(**given)


@pytest.mark.parametrize("value", [1e308, 1e31, 1e-31, 5e-324])
@pytest.mark.parametrize("name", ["teacher", "student", "items", "per", "volume", "training"])
def test_figures_beyond_all_measure_are_refused(name: str, value: float) -> None:
    given: dict[str, Any] = {"teacher": 2, "student": 1, "items": 9, "epochs": 1, name: value}
    with pytest.raises(ValueError, match=f"^{name} must be from 1e-30 to 1e"):
        budget(**given)


@pytest.mark.parametrize("value", [1e30, 2e-30])
def test_no_product_of_figures_overflows(value: float) -> None:
    names = ("items", "views", "epochs", "trials", "volume")
    for per in (1e30, 1e-30):
        plan = budget(teacher=value, student=value / 2, per=per, **dict.fromkeys(names, value))
        assert all(number is None or math.isfinite(number) for number in vars(plan).values())
        text = io.StringIO()
        Console(file=text, width=100).print(make_budget_table(plan, per=per))
        assert max(map(len, text.getvalue().splitlines())) <= 100
        assert len(describe_budget(plan)) < 150


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_training_may_be_free_but_no_less(value: float) -> None:
    with pytest.raises(ValueError, match=r"training must be a finite number, 0 or more, got"):
        budget(teacher=2, student=1, items=9, training=value)
    assert budget(teacher=2, student=1, items=9, training=0).distilling == 18


def test_training_must_be_known() -> None:
    with pytest.raises(ValueError, match="training must be given, or epochs to compute it from"):
        budget(teacher=2, student=1, items=9)


@pytest.mark.parametrize(
    ("gap", "value", "break_even"),
    [
        (2, 1.5e-6, 11_000 / 6.5e-6),
        (0, 1.5e-6, 11_000 / 9.5e-6),
        (-1, 0.5e-6, 11_000 / 10e-6),  # a student that is better is worth more than it saves
        (2, 4.75e-6, None),
        (2, 5e-6, None),
    ],
)
def test_the_break_even_is_weighted_by_what_the_gap_costs(
    gap: float, value: float, break_even: float | None
) -> None:
    plan = budget(
        teacher=10, student=0.5, per=1e6, items=1e9, training=1000, gap=gap, point_value=value * 1e6
    )
    assert plan.saving == pytest.approx(9.5e-6)
    assert plan.gain == pytest.approx(9.5e-6 - value * gap, abs=1e-18)
    assert plan.break_even == (None if break_even is None else pytest.approx(break_even))
    assert ("never pays" in describe_budget(plan)) == (break_even is None)


def test_a_gap_that_costs_more_than_is_saved_is_named() -> None:
    plan = budget(teacher=10, student=1, items=10, training=5, gap=2, point_value=5, rate=7)
    assert describe_budget(plan) == (
        "distilling costs 105 and never pays: the gap of 2 points costs 10 per item, and 9 is "
        "saved, there is no break-even"
    )
    assert plan.days is None


def test_a_student_that_is_better_may_pay_though_it_saves_nothing() -> None:
    plan = budget(teacher=1, student=1, items=10, training=5, gap=-2, point_value=5)
    assert plan.break_even == pytest.approx(15 / 10)


def test_at_a_rate_the_break_even_is_a_number_of_days() -> None:
    plan = budget(teacher=3, student=1, items=10, training=10, rate=4)
    assert (plan.break_even, plan.days) == (20, 5)
    assert describe_budget(plan).endswith("after 20 served items, in 5 days at 4 a day")


def test_the_training_of_the_teacher_counts_where_it_is_asked_for() -> None:
    shown = budget(teacher=3, student=1, items=10, training=10, teacher_training=100)
    counted = budget(
        teacher=3, student=1, items=10, training=10, teacher_training=100, counts_teacher=True
    )
    assert (shown.distilling, counted.distilling) == (40, 140)


def test_the_search_is_the_trials_that_are_not_taken() -> None:
    plan = budget(teacher=2, student=0.1, items=1000, epochs=20, trials=8)
    assert plan.search == pytest.approx(plan.training * 7 / 8)


def test_a_teacher_that_runs_live_runs_at_each_training_step() -> None:
    plan = budget(teacher=2, student=0.1, items=1000, epochs=20, trials=8, live=True)
    assert plan.caching == 8 * 20 * 1000 * 2
    text = io.StringIO()
    Console(file=text, width=100).print(make_budget_table(plan))
    assert "running the teacher at each training step" in text.getvalue()


@pytest.mark.parametrize(
    ("name", "value"),
    [("gap", math.nan), ("gap", math.inf), ("gap", 1e31), ("point_value", -1.0), ("rate", 0.0),
     ("teacher_training", -1.0), ("search", math.nan), ("caching", -1.0)],
)  # fmt: skip
def test_bad_weights_are_refused(name: str, value: float) -> None:
    given: dict[str, Any] = {"teacher": 2, "student": 1, "items": 9, "training": 1, "gap": 1.0}
    with pytest.raises(ValueError, match=f"^{name} must be "):
        budget(**given | {"point_value": 1.0} | {name: value})


def test_a_point_s_value_needs_a_gap() -> None:
    with pytest.raises(ValueError, match="gap must be given with point_value"):
        budget(teacher=2, student=1, items=9, training=1, point_value=1)


# --- the command ---


def as_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main([*arguments, "--format", "json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_prints_a_table_and_a_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TOKENS, "--training", "1000", "--unit", "token", "--volume", "3e9"]) == 0
    printed = capsys.readouterr().out
    assert "caching teacher logits of 1 billion tokens, once" in printed
    assert "1,157,894,737" in printed
    assert printed.splitlines()[-1] == (
        "distilling costs 11,000 and has paid for itself after 1.16 billion served tokens; "
        "at 3 billion it saves 17,500"
    )


def test_json_holds_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *TOKENS, "--training", "1000", "--unit", "token")
    assert Budget(**{k: found[k] for k in Budget.__dataclass_fields__}) == budget(
        teacher=10, student=0.5, per=1e6, items=1e9, training=1000
    )
    assert "1.16 billion" in found["sentence"]


def test_times_become_costs_by_the_price_of_an_hour(capsys: pytest.CaptureFixture[str]) -> None:
    times = ["--teacher-ms", "36", "--student-ms", "3.6", "--train-seconds", "1800"]
    found = as_json(capsys, *times, "--items", "1000", "--price", "2")
    assert found["teacher_cost"] == pytest.approx(2e-5)
    assert found["student_cost"] == pytest.approx(2e-6)
    assert found["training"] == pytest.approx(1.0)
    hours = as_json(capsys, *times, "--items", "1000")
    assert hours["distilling"] == pytest.approx(found["distilling"] / 2)
    assert "hours of the machine" in hours["notes"][0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TOKENS], "training must be given, or epochs"),
        ([*TOKENS, "--training", "-1"], "training must be a finite number, 0 or more, got -1.0"),
        ([*TOKENS, "--student", "nan", "--epochs", "1"], "student must be .* above 0, got nan"),
        (["--teacher", "1"], "--student, --student-ms or --from RUN must be given"),
        (["--teacher", "1", "--student", "1"], "--items or --from RUN must be given"),
        (["--teacher-ms", "0"], "--teacher-ms must be a finite number above 0, got 0.0"),
        (
            ["--teacher", "1", "--student-ms", "1", "--items", "5"],
            r"--price, the cost of a machine's hour, must be given where costs \(--teacher\) meet "
            r"times \(--student-ms\)",
        ),
        (["--teacher-ms", "1e308"], "--teacher-ms must be from 1e-30 to 1e"),
        (["--price", "1e308"], "--price must be from 1e-30 to 1e"),
        (["--teacher-params", "0"], "--teacher-params must be a finite number above 0, got 0.0"),
        (["--student-params", "-5"], "--student-params must be a finite number above 0, got -5.0"),
        (["--student-params", "nan"], "--student-params must be a finite .* above 0, got nan"),
        (["--teacher-params", "5"], "--student-params must be given with --teacher-params"),
        ([*SIZES], "--items, --tokens or --from RUN must be given"),
        ([*SIZES, "--tokens", "5", "--items", "5"], "--tokens must be given without --items, got"),
        ([*SIZES, "--tokens", "0"], "--tokens must be a finite number above 0, got 0.0"),
        ([*SIZES, "--tokens", "5", "--rate", "0"], "--rate must be a number of .*, got 0"),
        ([*SIZES, "--tokens", "5", "--rate", "nan/s"], "--rate must be a number .*, got nan/s"),
        ([*SIZES, "--tokens", "5", "--rate", "3/week"], "--rate must be a number .*, got 3/week"),
        ([*SIZES, "--tokens", "5", "--gap", "nan"], "gap must be a finite number of points, got"),
        ([*SIZES, "--tokens", "5", "--point-value", "1"], "gap must be given with point_value"),
        ([*TOKENS, "--epochs", "1", "--teacher-training"], "--teacher-training must be given a co"),
        (["--from", "nowhere"], r"--from must be a run folder \(with a config.yaml\), got nowhere"),
    ],
)
def test_bad_input_is_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert re.search(message, line), line


def test_from_sizes_a_token_costs_two_operations_a_parameter_and_six_where_it_is_trained(
    capsys: pytest.CaptureFixture[str],
) -> None:
    sizes = ["--teacher-params", "7e10", "--student-params", "8e9", "--tokens", "1e12"]
    found = as_json(capsys, *sizes, "--rate", "1e6/s")
    assert (found["of"], found["unit"]) == ("operations", "token")
    assert found["teacher_cost"] == 2 * 7e10
    assert found["training"] == pytest.approx(6 * 8e9 * 1e12)
    assert found["caching"] == pytest.approx(2 * 7e10 * 1e12)
    assert found["days"] == pytest.approx(found["distilling"] / (2 * 6.2e10) / 86_400 / 1e6)
    counted = as_json(capsys, *sizes, "--trials", "3", "--epochs", "2", "--teacher-training")
    assert counted["teacher_training"] == pytest.approx(6 * 7e10 * 2e12)
    assert counted["training"] == pytest.approx(3 * 6 * 8e9 * 2e12)
    assert counted["search"] == pytest.approx(2 / 3 * counted["training"])
    whole = counted["caching"] + counted["training"] + counted["teacher_training"]
    assert counted["distilling"] == pytest.approx(whole)


def test_costs_and_sizes_stand_side_by_side(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TOKENS, "--training", "1000", *SIZES, "--unit", "token"]) == 0
    printed = capsys.readouterr().out
    assert printed.splitlines()[1].split() == ["cost", "operations"]
    assert "distilling costs 11,000 and" in printed
    assert "distilling takes 182 billion operations and" in printed  # one epoch


@pytest.mark.parametrize(
    ("text", "rate"),
    [
        ("1e6", 1e6),
        ("20/s", 20 * 86_400),
        ("2/min", 2880),
        ("3/h", 72),
        ("5/day", 5),
        ("1 / s", 86400),
    ],
)
def test_rates_are_a_day_or_in_another_time(
    text: str, rate: float, capsys: pytest.CaptureFixture[str]
) -> None:
    assert as_json(capsys, *SIZES, "--items", "9", "--rate", text)["rate"] == rate


def test_a_gap_without_a_value_is_said_to_cost_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    found = as_json(capsys, *SIZES, "--items", "9", "--gap", "3")
    assert "a gap costs nothing without --point-value, what a point is worth" in found["notes"]


def test_starts_without_torch() -> None:
    code = (
        "import sys; from selfkd.budget import main; "
        f"main({[*TOKENS, '--epochs', '1']}); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=600)


# --- from a run ---


def finished_run(folder: Path, command: str, summary: object) -> str:
    config = load_config(settings=["train.epochs=7"])
    run = RunFolder.create(folder / "run", config, command=command)
    save_row(run.path / "data.json", Facts(items={"train": 200}, views=2))
    save_row(run.path / "summary.json", summary)
    for number in range(3):
        trial = TrialResult(
            stage="student", trial=number, seed=number, status="completed", train_seconds=1.5
        )
        save_row(run.path / "student" / f"trial_00{number}" / "result.json", trial)
    return str(run.path)


VERDICT = Verdict(name="student", to="labels")
ENSEMBLE = EnsembleSummary(
    verdict=VERDICT,
    rows=(
        TableRow(name="ensemble of 5, probabilities", ms_1=10.0, ms_128=1.0),
        TableRow(name="ensemble of 5, logits", ms_1=12.0, ms_128=2.0),
        TableRow(name="student, from its teacher", ms_1=3.0, ms_128=0.5),
    ),
    teacher=TeacherRow(source="members", members=5, ms_1=12.0, ms_128=2.0),
    chosen=Chosen(temperature=4.0, alpha=0.5, average="logits", hash="abc"),
    trials=3,
    seeds=0,
    gain=Interval(0.01),
)


def test_an_ensemble_s_run_gives_times_seconds_and_trials(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "ensemble", ENSEMBLE)
    assert measured(run) == {
        "epochs": 7,
        "items": 200,
        "views": 2,
        "teacher_ms": 2.0,
        "student_ms": 0.5,
        "trials": 3,
        "train_seconds": 4.5,
    }
    found = as_json(capsys, "--from", run, "--price", "3.6")
    assert found["caching"] == pytest.approx(200 * 2 * 2.0 / 3.6e6 * 3.6)
    assert found["training"] == pytest.approx(4.5 / 3600 * 3.6)
    assert found["break_even"] == pytest.approx(found["distilling"] / (1.5e-6))
    alone = as_json(capsys, "--from", run, "--batch", "1")
    assert alone["teacher_cost"] / alone["student_cost"] == pytest.approx(4.0)


def test_times_of_windows_are_those_of_their_tokens(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "ensemble", ENSEMBLE)
    whole = measured(run)
    facts = json.loads((Path(run) / "data.json").read_text())
    (Path(run) / "data.json").write_text(
        json.dumps(facts | {"unit": "tokens", "items_an_input": 50})
    )
    assert measured(run) == whole | {
        name: whole[name] / 50 for name in ("teacher_ms", "student_ms")
    }
    assert main(["--from", run]) == 0
    assert "teacher, per million tokens" in capsys.readouterr().out


def test_given_figures_replace_measured_ones(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "ensemble", ENSEMBLE)
    found = as_json(capsys, "--from", run, "--price", "3.6", "--teacher", "1", "--items", "10")
    assert (found["teacher_cost"], found["caching"]) == (1.0, 20.0)
    planned = as_json(capsys, "--from", run, "--trials", "2")
    assert planned["training"] == pytest.approx(2 * 7 * 200 * 3 * planned["student_cost"])


def test_a_run_of_generations_has_no_times_of_predictions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = GenerationResult(generation=0, trial=0, trials=4, train_seconds=9.0)
    run = finished_run(tmp_path, "generations", GenerationsSummary(generations=(generation,) * 3))
    found = measured(run)
    assert (found["trials"], found["train_seconds"]) == (8, 18.0)  # of those that had a teacher
    assert main(["--from", run]) == 2
    assert (
        "error: --teacher, --teacher-ms or --teacher-params must be given: "
        in capsys.readouterr().err
    )


def test_a_capacity_run_has_students_to_choose_from(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    measures: dict[str, Any] = {"difference": Interval(0.0), "room": Interval(0.0)}
    measures |= dict.fromkeys(("labels", "distilled"), Seeds(value=0.9))
    sizes = [
        Size(
            value=width,
            parameters=width,
            ms_1=width,
            ms_128=width / 10,
            train_seconds=2.0,
            **measures,
        )
        for width in (4, 8)
    ]
    teacher = TeacherRow(source="members", members=5, ms_1=50.0, ms_128=5.0)
    summary = CapacitySummary(
        key="model.args.width", seeds=1, teacher=teacher, sizes=tuple(sizes), verdict=VERDICT
    )
    run = finished_run(tmp_path, "capacity", summary)
    assert measured(run, value="8")["student_ms"] == 0.8
    assert main(["--from", run]) == 2
    error = capsys.readouterr().err
    assert "--value must be one of the run's students (4, 8), got None" in error


def test_the_gap_of_a_run_is_that_of_its_scores(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student = TableRow(name="student", metrics={"test_accuracy": 0.9}, ms_1=3.0, ms_128=0.5)
    teacher = TeacherRow(
        source="members", members=5, metrics={"test_accuracy": 0.93}, ms_1=12.0, ms_128=2.0
    )
    run = finished_run(tmp_path, "ensemble", replace(ENSEMBLE, rows=(student,), teacher=teacher))
    assert measured(run)["gap"] == pytest.approx(3.0)
    found = as_json(capsys, "--from", run, "--point-value", "1e-7")
    assert found["gain"] == pytest.approx(1.5 / 3.6e6 - 3e-7)
    assert "the gap of 3 points counted" in found["sentence"]
    given = as_json(capsys, "--from", run, "--point-value", "1e-7", "--gap", "20")
    assert given["break_even"] is None
    kept = "the student keeps 96.77 % of the teacher's test accuracy"
    assert kept in given["notes"]


def test_the_teachers_training_of_a_run_is_shown_and_counted_where_it_is_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = finished_run(tmp_path, "ensemble", ENSEMBLE)
    for number in range(2):
        trial = TrialResult(
            stage="members", trial=number, seed=number, status="completed", train_seconds=9.0
        )
        save_row(Path(run) / "members" / f"trial_00{number}" / "result.json", trial)
    shown = as_json(capsys, "--from", run, "--price", "3600")
    counted = as_json(capsys, "--from", run, "--price", "3600", "--teacher-training")
    assert shown["teacher_training"] == counted["teacher_training"] == pytest.approx(18.0)
    assert counted["distilling"] == pytest.approx(shown["distilling"] + 18.0)
    assert main(["--from", run, "--teacher-training", "5"]) == 2
    assert "where costs (--teacher-training) meet times" in capsys.readouterr().err


def test_a_run_without_a_student_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generation = GenerationResult(generation=0, trial=0)
    run = finished_run(tmp_path, "generations", GenerationsSummary(generations=(generation,)))
    assert main(["--from", run]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "--from must be a run with a student, got" in line


def test_a_study_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder.create(tmp_path / "run", load_config(), command="study")
    assert main(["--from", str(run.path)]) == 2
    error = capsys.readouterr().err
    assert "--from must be a run of selfkd.ensemble, capacity, generations, got" in error


def test_a_damaged_summary_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = finished_run(tmp_path, "ensemble", ENSEMBLE)
    (Path(run) / "summary.json").write_text("{")
    assert main(["--from", run]) == 2
    assert f"{run}/summary.json is damaged" in capsys.readouterr().err


def test_an_unfinished_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = RunFolder.create(tmp_path / "run", load_config())
    assert main(["--from", str(run.path)]) == 2
    assert "--from must be a finished run (with a summary.json)" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "summary", "message"),
    [
        ("study", "{}", "must be a run of selfkd.ensemble, capacity, generations, got"),
        (b"\xff\xfe", "{}", "must be a run of selfkd.ensemble, capacity, generations, got"),
        (None, "{}", "must be a run of selfkd.ensemble, capacity, generations, got"),
        ("generations", None, r"must be a finished run \(with a summary.json\), got"),
        ("generations", '{"format": 1', "summary.json is damaged"),
        ("generations", "[]", "summary.json is damaged"),
        ("generations", '{"format": 1, "generations": 5}', "summary.json is damaged"),
        ("ensemble", "{}", "summary.json must be of format 1, got None"),
    ],
)
def test_runs_without_figures_are_one_message(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    command: str | bytes | None,
    summary: str | None,
    message: str,
) -> None:
    folder = RunFolder.create(tmp_path / "run", load_config(), command="generations")
    (folder.path / "command").unlink()
    if command is not None:
        raw = command.encode() if isinstance(command, str) else command
        (folder.path / "command").write_bytes(raw)
    if summary is not None:
        (folder.path / "summary.json").write_text(summary)
    save_row(folder.path / "data.json", Facts(items={"train": 5}))
    assert main(["--from", str(folder.path), "--teacher", "1", "--student", "1"]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error)
    assert len(error.splitlines()) == 1
