"""The response that a report draws over T and alpha: of which trials, and which way is better."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from run_folders import generations_run

from selfkd.reporting.read import Run, read_run
from selfkd.reporting.sections.generations import generation_sections
from selfkd.reporting.sections.panels import Panel, response
from selfkd.results import TrialResult
from selfkd.storage.rows import load_row, save_row

SETTINGS = list(itertools.product((1.5, 2.5, 4.0, 6.0, 9.0), (0.1, 0.3, 0.5, 0.7, 0.9)))


def bowl(temperature: float, alpha: float) -> float:
    """Return 0 at T = 4 and alpha = 0.5, more elsewhere."""
    return 0.3 * abs(temperature - 4) / 8 + abs(alpha - 0.5)


def mean_bowl() -> float:
    return sum(bowl(*setting) for setting in SETTINGS) / len(SETTINGS)


def made(path: Path, key: str, value: Callable[[float, float], float], *settings: str) -> Run:
    """Make a run whose trials of generation 1 reached what a function says."""
    generations_run(path, rounds=1, trials=len(SETTINGS), settings=settings)
    for number, (temperature, alpha) in enumerate(SETTINGS):
        file = path / "generation_001" / f"trial_{number:03d}" / "result.json"
        trial = load_row(TrialResult, file)
        point = {"distill.temperature": temperature, "distill.alpha": alpha}
        metrics = {**trial.metrics, key: value(temperature, alpha)}
        save_row(file, replace(trial, point=point, metrics=metrics))
    return read_run(path)


def drawn_map(run: Run) -> Panel:
    search = next(s for s in generation_sections(run) if s.title == "Search on validation")
    return search.panels[0]


def best_point(run: Run) -> str:
    (_, text) = response(run, [(1, run.generations[1].trials)])
    return text


@pytest.mark.parametrize(
    ("key", "sign", "settings"),
    [
        ("val_accuracy", -1, ()),
        ("val_nll", 1, ("search.metric=val_nll", "search.mode=min")),
    ],
)
def test_the_best_point_is_the_best_by_the_runs_own_metric(
    tmp_path: Path, key: str, sign: int, settings: tuple[str, ...]
) -> None:
    run = made(tmp_path / "run", key, lambda t, alpha: 0.9 + sign * 0.1 * bowl(t, alpha), *settings)
    surface, text = response(run, [(1, run.generations[1].trials)])
    assert surface is not None
    cells = [(v, t, a) for row, a in zip(surface.values, surface.alphas, strict=True)
             for v, t in zip(row, surface.temperatures, strict=True)]  # fmt: skip
    value, temperature, alpha = (max if sign < 0 else min)(cells)
    assert (temperature, alpha) == (pytest.approx(4, rel=0.3), pytest.approx(0.5, abs=0.1))
    assert value == pytest.approx(-sign * 0.1 * mean_bowl(), abs=0.03)  # against the mean
    assert f"best at T {temperature:.3g} [" in text
    assert f"alpha {alpha:.2f} [" in text
    assert text in drawn_map(run).text


def test_trials_that_did_not_run_to_their_end_are_no_part_of_it(tmp_path: Path) -> None:
    run = made(tmp_path / "run", "val_accuracy", lambda t, alpha: 0.9 - 0.1 * bowl(t, alpha))
    before = best_point(run)
    folder = run.path / "generation_001"
    for number, status in enumerate(("stopped", "failed"), start=len(SETTINGS)):
        trial = TrialResult(
            stage="generation-1",
            trial=number,
            seed=number,
            status=status,
            point={"distill.temperature": 2.0, "distill.alpha": 0.3},
            metrics={"val_accuracy": 0.1},
        )
        save_row(folder / f"trial_{number:03d}" / "result.json", trial)
    run = read_run(run.path)
    assert len(run.generations[1].trials) == len(SETTINGS) + 2
    assert best_point(run) == before
    figure = drawn_map(run).figure
    assert figure is not None
    assert "+5" not in figure.legend[2][0]  # points, of a scale that the trial cut short is not in


def test_it_reaches_over_what_was_searched(tmp_path: Path) -> None:
    run = made(tmp_path / "run", "val_accuracy", lambda t, alpha: 0.9 - 0.1 * bowl(t, alpha))
    surface, _ = response(run, [(1, run.generations[1].trials)])
    assert surface is not None
    searched = run.searched("distill.temperature")
    assert (surface.temperatures[0], surface.temperatures[-1]) == (min(searched), max(searched))
    assert run.searched("distill.nothing") == []


def test_no_surface_is_drawn_where_nothing_is_known(tmp_path: Path) -> None:
    noise = random.Random(0)
    run = made(tmp_path / "run", "val_accuracy", lambda t, alpha: 0.9 + 0.01 * noise.random())
    surface, text = response(run, [(1, run.generations[1].trials)])
    assert surface is None
    assert "do not show that T or alpha matters" in text


def test_generations_are_pooled_each_against_its_own_mean(tmp_path: Path) -> None:
    run = made(tmp_path / "run", "val_accuracy", lambda t, alpha: 0.9 - 0.1 * bowl(t, alpha))
    own = run.generations[1].trials
    better = [replace(t, metrics={"val_accuracy": t.metrics["val_accuracy"] + 0.05}) for t in own]
    pooled, _ = response(run, [(1, own), (2, better)])
    assert pooled is not None
    assert max(max(row) for row in pooled.values) < 0.05
