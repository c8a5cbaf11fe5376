"""What is printed: on a terminal and in a log, for what succeeds and what fails."""

from __future__ import annotations

import io
import re
from typing import Any

import pytest
from rich.console import Console

from selfkd.cli.progress import Follower
from selfkd.cli.terminal import make_confirmation_table, make_sparkline, make_table, print_table

TRIAL: dict[str, Any] = {
    "stage": "generation-1",
    "trial": 0,
    "point": {"distill.temperature": 4.0, "distill.alpha": 0.5},
    "status": "completed",
    "error": None,
    "val_accuracy": 0.9,
    "train_seconds": 2.0,
}
RESULT: dict[str, Any] = {
    "generation": 1,
    "point": TRIAL["point"],
    "temperature": 4.0,
    "alpha": 0.5,
    "val_accuracy": 0.9,
    "test_accuracy": 0.8125,
    "test_nll": 0.5,
    "test_ece": 0.01,
    "agreement": 0.75,
    "seconds": 3.0,
    "models": [{}],
    "wanted_models": 1,
}


def follow(*trials: dict[str, Any], terminal: bool = False) -> tuple[str, Follower]:
    output = io.StringIO()
    console = Console(
        file=output, force_terminal=terminal, width=110, markup=False, highlight=False
    )
    with Follower(console) as follower:
        follower.working("generation 1: labelling by 2 teachers", 4)
        follower.worked({"state": "kept"})
        follower.stage_started("generation 1 of 2", 3, 1)
        for trial in trials:
            follower.trial_reported(trial, [{"epoch": 7}])
            follower.trial_finished(trial)
        follower.generation_finished(RESULT)
    return output.getvalue(), follower


def test_a_log_has_a_line_a_trial() -> None:
    text, follower = follow(TRIAL, {**TRIAL, "trial": 1, "status": "stopped"})
    assert text.splitlines() == [
        "generation 1: labelling by 2 teachers: 4 parts",
        "generation 1 of 2: 3 trials, 1 of them done before",
        "  trial 0: val 90.00% (T 4, alpha 0.5), 2.0 s",
        "  trial 1: val 90.00% (T 4, alpha 0.5), 2.0 s (stopped early)",
        "generation 1: val 90.00%, test 81.25%, agrees with its teacher on 75.00% (T 4, alpha 0.5)",
    ]
    assert follower.train_seconds == 4.0


@pytest.mark.parametrize("terminal", [False, True])
def test_a_failed_trial_says_why_to_the_letter(terminal: bool) -> None:
    error = "ValueError: width must be positive, got [1, 2] [/b]"
    text, _ = follow({**TRIAL, "status": "failed", "error": error}, terminal=terminal)
    assert f"trial 0 failed: {error}" in text


def test_a_terminal_shows_the_best_so_far() -> None:
    text, _ = follow(TRIAL, {**TRIAL, "trial": 1, "val_accuracy": 0.8}, terminal=True)
    assert "generation 1 of 2" in text
    assert "best val 90.00% (T 4, alpha 0.5)" in text
    assert "3/3" in text


def test_the_table_has_a_row_a_generation_and_the_ensemble_last() -> None:
    first = {**RESULT, "generation": 0, "temperature": None, "alpha": None}
    del first["agreement"]
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(make_table([first, RESULT], {**RESULT, "test_accuracy": 0.99}))
    cells = [
        line.split() for line in console.export_text().splitlines() if re.search(r"%|NLL", line)
    ]
    assert cells == [
        "generation T alpha val acc test acc NLL ECE agrees seconds".split(),  # noqa: SIM905
        ["0", "90.00%", "81.25%", "0.5000", "0.0100", "3.0"],
        ["1", "4.00", "0.50", "90.00%", "81.25%", "0.5000", "0.0100", "75.00%", "3.0"],
        ["ensemble", "90.00%", "99.00%", "0.5000", "0.0100"],
    ]


def live(console: Console, *, epochs: int | None = 10, quiet: bool = False) -> Follower:
    """A stage of four trials: one done, one failed, two running."""
    with Follower(console, epochs=epochs, quiet=quiet) as follower:
        follower.stage_started("generation 1 of 2", 4, 0)
        follower.trial_reported(TRIAL, [{"epoch": 5}])
        follower.trial_reported({**TRIAL, "trial": 1}, [{"epoch": 2}])
        follower.trial_finished(TRIAL)
        follower.trial_finished({**TRIAL, "trial": 1, "status": "failed", "error": "bad"})
        follower.trial_reported({**TRIAL, "trial": 2}, [{"epoch": 3}])
        follower.trial_reported({**TRIAL, "trial": 3}, [{"epoch": 400}])
    return follower


def terminal(width: int) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, markup=False, highlight=False
    )


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def frame(console: Console) -> list[str]:
    """The last lines of a live view, without what steers the terminal."""
    text = CONTROL.sub("", written(console)).replace("\r", "\n")
    return [line.rstrip() for line in text.splitlines() if line.strip()]


@pytest.mark.parametrize("width", [40, 110])
def test_the_live_view_fits_its_terminal(width: int) -> None:
    console = terminal(width)
    live(console)
    lines = frame(console)
    assert all(len(line) <= width for line in lines)
    text = "\n".join(lines)
    assert "2 running, 1 failed" in text
    assert "best val 90.00% (T 4, alpha 0.5)" in text
    assert "3/4" in text or "2/4" in text


def test_the_time_left_is_estimated_from_epochs() -> None:
    console = terminal(80)
    live(console)
    assert re.search(r"running, 1 failed, \d+:\d\d left", "\n".join(frame(console)))


def test_no_color_leaves_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = terminal(80)
    live(console)
    codes = re.findall(r"\x1b\[([0-9;]*)m", written(console))
    assert not [c for code in codes for c in code.split(";") if c and 30 <= int(c) <= 107]


@pytest.mark.parametrize("width", [40, 110])
def test_quiet_tells_only_what_fails(width: int) -> None:
    for console in (terminal(width), Console(file=io.StringIO(), width=width, markup=False)):
        live(console, quiet=True)
        assert frame(console) == ["  trial 1 failed: bad"]


def test_a_table_leaves_out_columns_on_a_narrow_terminal() -> None:
    console = Console(file=io.StringIO(), width=40, markup=False)
    print_table(console, make_table([RESULT], {**RESULT, "test_accuracy": 0.99}))
    text = written(console)
    assert all(len(line) <= 40 for line in text.splitlines())
    assert "test acc" in text
    assert "99.00%" in text
    assert "…" not in text
    assert "left out for want of width: " in text


def test_a_table_that_fits_is_whole() -> None:
    console = Console(file=io.StringIO(), width=90, markup=False)
    print_table(console, make_table([RESULT], None))
    assert "seconds" in written(console)
    assert "left out" not in written(console)


def confirmation(generation: int, **more: Any) -> dict[str, Any]:
    found = {"value": 0.0064, "low": -0.0109, "high": 0.0237}
    return {
        "generation": generation,
        "seeds": [1, 2, 3],
        "test_accuracy": [0.95, 0.96, 0.97],
        "mean": {"value": 0.9593, "low": 0.9545, "high": 0.9641},
        "first": found if generation else None,
        "previous": {"value": -0.0008, "low": None, "high": None} if generation else None,
        "mcnemar": {"only_student": 3, "only_teacher": 1, "p": 0.625} if generation else None,
        "verdict": "x",
        **more,
    }


def printed(table: Any) -> str:
    console = Console(file=io.StringIO(), width=80, record=True)
    console.print(table)
    return console.export_text()


def test_the_confirmation_has_means_and_paired_differences_in_80_columns() -> None:
    results = [{"confirmation": confirmation(number)} for number in (0, 10)]
    controls = [
        {
            "title": "ensemble of 11 seeds",
            "mean": {"value": 0.9593, "low": 0.95, "high": 0.97},
            "first": {"value": -0.1064, "low": -0.1209, "high": -0.0937},
        }
    ]
    lines = printed(make_confirmation_table(results, controls)).splitlines()
    assert max(len(line) for line in lines) <= 80
    assert [" ".join(line.split()) for line in lines if re.search(r"\d", line)] == [
        "3 fresh seeds mean test acc vs generation 0 vs one before McNemar",
        "generation 0 95.93% ± 0.48%",
        "generation 10 95.93% ± 0.48% +0.64% ± 1.73% -0.08% 0.62",
        "ensemble of 11 seeds 95.93% ± 1.07% -10.64% ± 1.45%",
    ]


def test_a_metric_that_is_no_accuracy_is_shown_as_it_is() -> None:
    of = {"mean": {"value": 4.5, "low": 4.25, "high": 4.75}, "metric": "loss", "mcnemar": None}
    results = [{"confirmation": confirmation(0, **of), "loss": 9.0}]
    assert "mean loss" in printed(make_confirmation_table(results, []))
    assert "4.5 ± 0.25" in printed(make_confirmation_table(results, []))
    assert make_sparkline(results, "loss") == "loss by generation:  ▄  (4.5 to 4.5)"


def test_the_sparkline_is_of_the_confirmation_where_there_is_one() -> None:
    low = confirmation(1, mean={"value": 0.5, "low": None, "high": None})
    results = [
        {"confirmation": confirmation(0), "test_accuracy": 0.1},
        {"confirmation": low, "test_accuracy": 0.2},
    ]
    line = "mean test accuracy by generation:  █▁  (50.00% to 95.93%)"
    assert make_sparkline(results, "val_accuracy") == line
    bare = [{**row, "confirmation": None} for row in results]
    line = "test accuracy by generation:  ▁█  (10.00% to 20.00%)"
    assert make_sparkline(bare, "val_accuracy") == line


def test_a_log_says_whose_trial_confirms() -> None:
    output = io.StringIO()
    console = Console(file=output, width=110, markup=False, highlight=False)
    with Follower(console) as follower:
        follower.trial_finished({**TRIAL, "stage": "confirm-2", "point": {}})
        follower.generation_confirmed(confirmation(2))
    assert output.getvalue().splitlines() == [
        "  confirm 2, trial 0: val 90.00%, 2.0 s",
        "generation 2 again on 3 fresh seeds: 95.93% ± 0.48%",
    ]
