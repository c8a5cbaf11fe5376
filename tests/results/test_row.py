"""Rows as JSON: metrics of any name and value come back as they were written."""

from __future__ import annotations

import json
import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from selfkd.results import (
    ArmRun,
    Diagnostics,
    Epoch,
    Evaluation,
    GenerationResult,
    Interval,
    Measured,
    TableRow,
    TrialResult,
    from_row,
    to_row,
)
from selfkd.storage.rows import load_row, save_row

ROWS: list[Measured] = [
    Epoch(epoch=1, hash="a", seconds=2.0),
    TrialResult(stage="a", trial=0, seed=1, status="completed", history=(Epoch(epoch=1),)),
    GenerationResult(generation=1, trial=2, temperature=4.0),
    Evaluation(hash="a"),
    TableRow(name="student", low=0.1),
    ArmRun(number=0, seed=1),
]


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: type(row).__name__)
def test_metrics_named_like_fields_survive(row: Measured, tmp_path: Path) -> None:
    kind: Any = type(row)
    names = [*(each.name for each in fields(kind)), "format", "error", "val_accuracy", "a/b", ""]
    metrics = {name: float(number) for number, name in enumerate(dict.fromkeys(names))}
    written = kind(**{**vars(row), "metrics": metrics})
    save_row(tmp_path / "row.json", written)
    read = load_row(kind, tmp_path / "row.json")
    assert read == written
    assert read.metrics == metrics


def test_metrics_without_a_clash_stand_beside_the_fields() -> None:
    row = to_row(Epoch(epoch=1, metrics={"val_accuracy": 0.5, "epoch": 2.0}))
    assert row == {"epoch": 1, "seconds": 0.0, "val_accuracy": 0.5, "metrics": {"epoch": 2.0}}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_numbers_that_json_does_not_have_are_null(value: float, tmp_path: Path) -> None:
    row = Diagnostics(metrics={"nll": value, "ece": 0.5, "scaled": value}, scaled={"nll": value})
    save_row(tmp_path / "row.json", row)
    json.loads((tmp_path / "row.json").read_text(), parse_constant=refuse)
    read = load_row(Diagnostics, tmp_path / "row.json")
    assert read.metrics["ece"] == 0.5
    assert read.scaled is not None
    for found in (read.metrics["nll"], read.metrics["scaled"], read.scaled["nll"]):
        assert math.isnan(found)
    assert to_row(Interval(value))["value"] is None


def test_a_training_reports_numbers_and_texts_of_its_own() -> None:
    row = {"epoch": 2, "hash": "a", "note": "b", "metrics": 1.0, "format": 2, "pid": "no number"}
    assert Epoch.reported(row) == Epoch(epoch=2, hash="a", metrics={"metrics": 1.0, "format": 2.0})


def test_damaged_metrics_are_named() -> None:
    with pytest.raises(ValueError, match="metrics"):
        from_row(Epoch, {"epoch": 1, "metrics": [1.0]})
