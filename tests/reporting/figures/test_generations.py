"""Figures hold what they were given, keep to the frame, and show names to the letter."""

from __future__ import annotations

import math
from typing import Any

import pytest

from selfkd.reporting.figures.charts import class_accuracy, counts, levels
from selfkd.reporting.figures.generations import (
    RING,
    accuracy_per_generation,
    curves,
    reliability,
    setting_map,
)
from selfkd.reporting.figures.style import (
    PALETTE,
    Bar,
    Level,
    Line,
    Measure,
    Step,
    Surface,
    generation_colour,
    generation_dash,
)

ACCURACY = Measure("accuracy")
STEPS = [
    Step(0, [(0, 0.9), (1, 0.95)], (1, 0.95), 0.93, Bar(0.93, 0.92, 0.94)),
    Step(1, [(0, 0.96), (1, 0.1), (2, math.nan)], (0, 0.96), 0.94, Bar(0.94)),
]


def named(figure: Any, name: str) -> list[Any]:
    return [trace for trace in figure.data if trace.name == name]


def test_all_trials_are_points_and_the_choice_stands_on_its_own() -> None:
    figure = accuracy_per_generation(STEPS, measure=ACCURACY, ensemble=0.97)
    (dots,) = named(figure, "each trial, validation")
    assert len(dots.x) == 4
    (ring,) = named(figure, "chosen, validation")
    places = {tuple(shown): x for shown, x in zip(dots.customdata, dots.x, strict=True)}
    assert ring.x == (places[0, 1, 0.95], places[1, 0, 0.96])
    (line,) = named(figure, "ensemble of all, test")
    assert line.y == (0.97, 0.97)
    bars = named(figure, "fresh seeds, test, 95 % interval")
    assert bars[0].error_y.array == pytest.approx([0.01])
    assert bars[1].error_y.visible is False


def test_a_trial_that_came_to_nothing_does_not_squeeze_the_rest() -> None:
    figure = accuracy_per_generation(STEPS, measure=ACCURACY)
    low, high = figure.layout.yaxis.range
    assert low > 0.8
    assert high < 1
    (dots,) = named(figure, "each trial, validation")
    assert min(dots.y) == low
    assert "triangle-down" in dots.marker.symbol


def test_generations_have_the_same_colours_everywhere() -> None:
    accuracy = accuracy_per_generation(STEPS, measure=ACCURACY)
    (tested,) = named(accuracy, "chosen, test")
    learning = curves([Line("generation 1", [1, 2], [0.1, 0.2], 1)], x="epoch", measure=ACCURACY)
    sure = reliability([(1, "generation 1", [(0.5, 0.4, 3)])])
    assert tested.marker.color[1] == generation_colour(1)
    assert learning.data[0].line.color == generation_colour(1)
    assert sure.data[1].line.color == generation_colour(1)
    looks = {(generation_colour(n), generation_dash(n)) for n in range(2 * len(PALETTE) + 1)}
    assert len(looks) == 2 * len(PALETTE) + 1


def test_a_map_marks_the_choice_and_takes_a_surface() -> None:
    points = [(1.0, 0.0, 0.9), (20.0, 1.0, 0.95)]
    surface = Surface([1, 20], [0, 1], [[0.9, 0.91], [0.92, 0.95]])
    figure = setting_map(
        points, measure=ACCURACY, chosen=(20.0, 1.0), bounds=(0.5, 1), surface=surface
    )
    response, trials, ring = figure.data
    assert [list(row) for row in response.z] == [[0.9, 0.91], [0.92, 0.95]]
    assert trials.marker.color == (0.9, 0.95)
    assert (ring.x, ring.y) == ((20.0,), (1.0,))
    assert ring.marker.color == RING  # an open symbol is drawn in the colour of its fill
    assert (figure.layout.coloraxis.cmin, figure.layout.coloraxis.cmax) == (0.5, 1)
    assert figure.layout.xaxis.type == "log"


def test_the_colours_of_a_map_turn_where_less_is_better() -> None:
    loss = Measure("NLL", percent=False, larger_is_better=False)
    assert setting_map([(1.0, 0.0, 0.9)], measure=loss).layout.coloraxis.reversescale


def test_an_interval_that_leaves_the_frame_is_cut() -> None:
    figure = levels([Level("share", Bar(0.5, -9, 40))], measure=ACCURACY, ends=(0, 1))
    error = figure.data[1].error_x
    assert (error.array, error.arrayminus) == ((0.5,), (0.5,))


def test_names_are_no_markup() -> None:
    evil = "<a href='javascript:alert(1)'>x</a>"
    shown = [
        levels([Level(evil, Bar(0.5))], measure=ACCURACY).to_json(),
        counts([evil], [evil], [[1]]).to_json(),
        class_accuracy([evil], [(0, "generation 0", [0.5])]).to_json(),
        curves([Line(evil, [1], [1])], x="epoch", measure=ACCURACY).to_json(),
    ]
    for text in shown:
        assert "<a" not in text
        assert "&lt;a" in text or "\\u0026lt;a" in text


def test_nothing_is_drawn_of_nothing() -> None:
    assert accuracy_per_generation([Step(0)], measure=ACCURACY).data
    assert setting_map([], measure=ACCURACY, temperatures=(1, 20)).data
