"""What a run prints while it goes on: on a terminal and in a log, of what succeeds and fails."""

from __future__ import annotations

import io
import re
from dataclasses import replace

import pytest
from rich.console import Console

from selfkd.cli.progress import ProgressReporter
from selfkd.config import Config, load_config
from selfkd.generations import _sparkline
from selfkd.results import (
    Confirmation,
    Epoch,
    GenerationConfirmed,
    GenerationFinished,
    GenerationResult,
    GenerationsSummary,
    Interval,
    Message,
    Model,
    StageStarted,
    TaskProgressed,
    TaskStarted,
    TrialFinished,
    TrialProgressed,
    TrialResult,
)

TRIAL = TrialResult(
    stage="generation-1",
    trial=0,
    seed=0,
    point={"distill.temperature": 4.0, "distill.alpha": 0.5},
    status="completed",
    metrics={"val_accuracy": 0.9},
    train_seconds=2.0,
)
RESULT = GenerationResult(
    generation=1,
    trial=0,
    point=TRIAL.point,
    temperature=4.0,
    alpha=0.5,
    metrics={
        "val_accuracy": 0.9,
        "test_accuracy": 0.8125,
        "test_nll": 0.5,
        "test_ece": 0.01,
        "agreement": 0.75,
    },
    seconds=3.0,
    models=(Model("abc", "student.safetensors"),),
)


TEN_EPOCHS = load_config(settings=["train.epochs=10"])


def epochs(*numbers: int) -> tuple[Epoch, ...]:
    return tuple(Epoch(epoch=number) for number in numbers)


def follow(*trials: TrialResult, terminal: bool = False) -> tuple[str, ProgressReporter]:
    output = io.StringIO()
    console = Console(
        file=output, force_terminal=terminal, width=110, markup=False, highlight=False
    )
    with ProgressReporter(console, Config()) as report:
        report(TaskStarted("generation 1: caching logits of 2 teachers", 4))
        report(TaskProgressed("kept"))
        report(StageStarted("generation 1 of 2", 3, 1))
        for trial in trials:
            report(TrialProgressed(trial, epochs(7)))
            report(TrialFinished(trial))
        report(GenerationFinished(RESULT))
    return output.getvalue(), report


def test_a_log_has_a_line_a_trial() -> None:
    text, report = follow(TRIAL, replace(TRIAL, trial=1, status="stopped"))
    assert text.splitlines() == [
        "generation 1: caching logits of 2 teachers: 4 parts",
        "generation 1 of 2: 3 trials, 1 of them done before",
        "  trial 0: val 90.00% (T 4, alpha 0.5), 2.0 s",
        "  trial 1: val 90.00% (T 4, alpha 0.5), 2.0 s (stopped early)",
        "generation 1: val 90.00%, test 81.25%, teacher agreement 75.00% (T 4, alpha 0.5)",
    ]
    assert report.train_seconds == 4.0


@pytest.mark.parametrize("terminal", [False, True])
def test_a_failed_trial_says_why_to_the_letter(terminal: bool) -> None:
    error = "ValueError: width must be positive, got [1, 2] [/b]"
    text, _ = follow(replace(TRIAL, status="failed", error=error), terminal=terminal)
    assert f"trial 0 failed: {error}" in text


def test_a_terminal_shows_the_best_so_far() -> None:
    text, _ = follow(TRIAL, replace(TRIAL, trial=1, metrics={"val_accuracy": 0.8}), terminal=True)
    assert "generation 1 of 2" in text
    assert "best val 90.00% (T 4, alpha 0.5)" in text
    assert "3/3" in text


def live(console: Console, *, quiet: bool = False) -> ProgressReporter:
    """A stage of four trials of ten epochs: one done, one failed, two running."""
    with ProgressReporter(console, TEN_EPOCHS, quiet=quiet) as report:
        report(StageStarted("generation 1 of 2", 4, 0))
        report(TrialProgressed(TRIAL, epochs(5)))
        report(TrialProgressed(replace(TRIAL, trial=1), epochs(2)))
        report(TrialFinished(TRIAL))
        report(TrialFinished(replace(TRIAL, trial=1, status="failed", error="bad")))
        report(TrialProgressed(replace(TRIAL, trial=2), epochs(3)))
        report(TrialProgressed(replace(TRIAL, trial=3), epochs(400)))
    return report


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
    assert re.search(r"running, 1 failed, \d:\d\d:\d\d left", "\n".join(frame(console)))


def test_no_color_leaves_no_colour(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_COLOR", "1")
    console = terminal(80)
    live(console)
    codes = re.findall(r"\x1b\[([0-9;]*)m", written(console))
    assert not [c for code in codes for c in code.split(";") if c and 30 <= int(c) <= 107]


@pytest.mark.parametrize("width", [40, 110])
def test_quiet_shows_only_what_fails(width: int) -> None:
    for console in (terminal(width), Console(file=io.StringIO(), width=width, markup=False)):
        live(console, quiet=True)
        assert frame(console) == ["  trial 1 failed: bad"]


def test_a_log_says_whose_trial_confirms() -> None:
    output = io.StringIO()
    console = Console(file=output, width=110, markup=False, highlight=False)
    with ProgressReporter(console, Config()) as report:
        report(TrialFinished(replace(TRIAL, stage="confirm-2", point={})))
        report(GenerationConfirmed(confirmation(2)))
    assert output.getvalue().splitlines() == [
        "  confirm 2, trial 0: val 90.00%, 2.0 s",
        "generation 2 again, 3 times: 95.93% ± 0.48%",
    ]


def test_a_log_says_which_fine_tuning_a_trial_is_of() -> None:
    output = io.StringIO()
    console = Console(file=output, width=110, markup=False, highlight=False)
    with ProgressReporter(console, Config()) as report:
        report(TrialFinished(replace(TRIAL, stage="deploy_pruned_labels-64be5ffa", point={})))
    assert output.getvalue() == "  pruned labels, trial 0: val 90.00%, 2.0 s\n"


def test_a_message_is_a_line_and_a_note_for_the_end() -> None:
    output = io.StringIO()
    console = Console(file=output, width=110, markup=False, highlight=False)
    with ProgressReporter(console, Config()) as report:
        report(Message("1 of the 4 trials failed"))
    assert output.getvalue() == "  1 of the 4 trials failed\n"
    assert report.notes == ["note:  1 of the 4 trials failed"]


def test_the_best_and_its_value_are_of_the_runs_own_metric() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=110, markup=False, highlight=False)
    config = load_config(settings=["search.metric=loss", "search.mode=min"])
    with ProgressReporter(console, config) as report:
        report(StageStarted("generation 1 of 2", 2, 0))
        for number, loss in enumerate((3.5, 2.25)):
            report(TrialFinished(replace(TRIAL, trial=number, point={}, metrics={"loss": loss})))
    assert "best loss 2.25" in frame(console)[-1]


def test_lines_of_a_task_by_nll_name_it() -> None:
    output = io.StringIO()
    console = Console(file=output, width=110, markup=False, highlight=False)
    config = load_config(settings=["search.metric=val_nll"])
    metrics = {"val_nll": 4.25, "val_perplexity": 70.1, "test_nll": 4.5, "test_perplexity": 90.0}
    with ProgressReporter(console, config) as report:
        report(GenerationFinished(replace(RESULT, metrics=metrics)))
        found = replace(confirmation(1), metric="test_nll", mean=Interval(4.5, 4.486, 4.514))
        report(GenerationConfirmed(found))
    lines = output.getvalue().splitlines()
    assert lines[0].startswith("generation 1: val NLL 4.250, test NLL 4.500")
    assert lines[1] == "generation 1 again, 3 times: test NLL 4.500 ± 0.014"


def confirmation(generation: int, mean: float = 0.9593) -> Confirmation:
    return Confirmation(
        generation=generation,
        seeds=(1, 2, 3),
        metric="test_accuracy",
        values=(0.95, 0.96, 0.97),
        mean=Interval(mean, 0.9545, 0.9641),
    )


# --- after the run: the line of `selfkd.generations` ---


def test_the_sparkline_is_of_the_confirmation_where_there_is_one() -> None:
    results = [
        replace(RESULT, generation=number, metrics={"test_accuracy": accuracy})
        for number, accuracy in enumerate((0.1, 0.2))
    ]
    bare = GenerationsSummary(generations=tuple(results))
    whole = replace(bare, confirmations=(confirmation(0), confirmation(1, 0.5)))
    line = "mean test accuracy by generation:  █▁  (50.00% to 95.93%)"
    assert _sparkline(whole, "val_accuracy", "accuracy") == line
    line = "test accuracy by generation:  ▁█  (10.00% to 20.00%)"
    assert _sparkline(bare, "val_accuracy", "accuracy") == line


def test_a_sparkline_of_a_metric_that_is_no_accuracy() -> None:
    loss = replace(confirmation(0, 4.5), metric="loss")
    summary = GenerationsSummary(
        generations=(replace(RESULT, metrics={"loss": 9.0}),), confirmations=(loss,)
    )
    assert _sparkline(summary, "loss", "accuracy") == "loss by generation:  ▄  (4.5 to 4.5)"
