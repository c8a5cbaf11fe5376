"""Every example runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_plot_generations_gives_means_and_paired_intervals(tmp_path: Path) -> None:
    accuracy = np.array([[0.90, 0.92, 0.95], [0.80, 0.81, 0.86], [0.85, 0.88, 0.89]])
    for number, row in enumerate(accuracy):
        *generations, ensemble = [{"test_accuracy": value} for value in row]
        folder = tmp_path / f"run-{number}"
        folder.mkdir()
        (folder / "summary.json").write_text(
            json.dumps({"generations": generations, "ensemble": ensemble})
        )
    printed = subprocess.run(
        [sys.executable, str(EXAMPLES / "plot_generations.py"), *map(str, tmp_path.iterdir())],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    gain = accuracy[:, 1] - accuracy[:, 0]
    half = stats.ttest_1samp(gain, 0).confidence_interval(0.95).high - gain.mean()
    assert "3 runs" in printed
    assert f"1: {accuracy[:, 1].mean():.2%}" in printed
    assert f"vs generation 0: {gain.mean():+.2%} ± {half:.2%}" in printed


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    sys.path.insert(0, str(EXAMPLES))
    try:
        from plot_generations import draw
    finally:
        sys.path.pop(0)
    draw(
        np.array([[0.9, 0.91, 0.95], [0.8, 0.83, 0.85]]), ["0", "1", "ensemble"], tmp_path / "a.svg"
    )
    assert (tmp_path / "a.svg").read_text().count("<path") > 5
