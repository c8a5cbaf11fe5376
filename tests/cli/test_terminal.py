"""Tables on a terminal: whole where there is room, else without their last columns."""

from __future__ import annotations

import io
import math
import re
from typing import Any

import pytest
from rich.console import Console
from rich.table import Table

from selfkd.cli.progress import ProgressReporter
from selfkd.cli.tables import chosen_table, own_metrics_table
from selfkd.cli.terminal import make_console, print_table
from selfkd.config import Config
from selfkd.results import Evaluation, GenerationResult, GenerationsSummary

METRICS = {"val_accuracy": 0.9, "test_accuracy": 0.8125, "test_nll": 0.5, "test_ece": 0.01}
RESULT = GenerationResult(
    generation=1, trial=0, temperature=4.0, alpha=0.5, metrics=METRICS, seconds=3.0
)
ENSEMBLE = Evaluation(hash="", metrics={**METRICS, "test_accuracy": 0.99})


def printed(width: int, ensemble: Evaluation | None = None) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, record=True)
    summary = GenerationsSummary(generations=(RESULT,), ensemble=ensemble)
    print_table(console, chosen_table(summary, "accuracy"))
    return console.export_text()


def test_a_table_hides_columns_on_a_narrow_terminal() -> None:
    text = printed(40, ENSEMBLE)
    assert all(len(line) <= 40 for line in text.splitlines())
    assert "test acc" in text
    assert "99.00%" in text
    assert "…" not in text
    assert "columns hidden (terminal too narrow): " in " ".join(text.split())


def test_a_table_that_fits_is_whole() -> None:
    text = printed(90)
    assert "seconds" in text
    assert "hidden" not in text


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def own_metrics(count: int, **more: float) -> GenerationResult:
    names = [f"class_{number}" for number in range(count)]
    metrics = {"val_accuracy": 0.5, **dict.fromkeys(names, 0.25), **more}
    return GenerationResult(generation=0, trial=0, metrics=metrics)


def test_a_thousand_metrics_are_cut_at_once() -> None:
    """As many cells are measured as have room, however many there are."""
    console = Console(file=io.StringIO(), width=60, markup=False, record=True)
    table = own_metrics_table([own_metrics(20_000)], "val_accuracy")
    measured = 0
    measure = Table._measure_column

    def counted(*arguments: Any) -> Any:
        nonlocal measured
        measured += 1
        return measure(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Table, "_measure_column", counted)
        print_table(console, table)
    assert measured < 2000
    text = " ".join(console.export_text().split())
    assert "val_accuracy class_0" in text
    assert re.search(r"columns hidden .*: class_\d, .* and 19\d{3} more$", text)


def test_a_file_has_all_columns() -> None:
    console = make_console(io.StringIO())
    print_table(console, own_metrics_table([own_metrics(300)], "val_accuracy"))
    head = written(console).splitlines()[1].split()
    assert head[3:] == ["val_accuracy", *(f"class_{number}" for number in range(300)), "seconds"]


def test_a_notebook_gets_lines_of_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """No block of HTML a line, and no live view, though its stdout says it is a terminal."""
    monkeypatch.setattr("rich.console._is_jupyter", lambda: True)
    output = io.StringIO()
    output.isatty = lambda: True  # type: ignore[method-assign]
    console = make_console(output)
    assert not console.is_terminal
    with ProgressReporter(console, Config()) as progress:
        progress.say("first")
    assert output.getvalue() == "first\n"


def test_the_columns_that_are_hidden_are_the_fewest() -> None:
    table = own_metrics_table([own_metrics(12)], "val_accuracy")
    shown = []
    for width in range(20, 200):
        console = Console(file=io.StringIO(), width=width, markup=False, record=True)
        print_table(console, table)
        text = console.export_text()
        assert all(len(line) <= width for line in text.splitlines()) or width < 35
        shown.append(text.splitlines()[1].count("class_") + ("seconds" in text.splitlines()[1]))
    assert shown == sorted(shown)
    assert set(shown) == set(range(14))


def test_numbers_that_are_missing_are_a_dash() -> None:
    metrics = {"b": math.inf, "c": -math.inf}
    table = own_metrics_table([own_metrics(0, a=math.nan, **metrics)], "val_accuracy")
    assert table.rows[0][3:-1] == ("0.5", "–", "–", "–")
