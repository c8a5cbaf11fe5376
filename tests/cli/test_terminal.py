"""Tables on a terminal: whole where there is room, else without their last columns."""

from __future__ import annotations

import io

from rich.console import Console

from selfkd.cli.terminal import print_table
from selfkd.reporting.tables import printed_table
from selfkd.results import Evaluation, GenerationResult, GenerationsSummary

METRICS = {"val_accuracy": 0.9, "test_accuracy": 0.8125, "test_nll": 0.5, "test_ece": 0.01}
RESULT = GenerationResult(
    generation=1, trial=0, temperature=4.0, alpha=0.5, metrics=METRICS, seconds=3.0
)
ENSEMBLE = Evaluation(hash="", metrics={**METRICS, "test_accuracy": 0.99})


def printed(width: int, ensemble: Evaluation | None = None) -> str:
    console = Console(file=io.StringIO(), width=width, markup=False, record=True)
    summary = GenerationsSummary(generations=(RESULT,), ensemble=ensemble)
    print_table(console, printed_table(summary))
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
