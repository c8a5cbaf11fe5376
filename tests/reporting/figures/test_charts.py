"""Figures hold what they were given, keep to the frame, and show names to the letter."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from xml.etree import ElementTree as Tree

import pytest

from selfkd.reporting.figures import charts
from selfkd.reporting.figures.style import (
    COLOURS,
    Bar,
    Figure,
    Gain,
    Level,
    Line,
    Measure,
    Setting,
    Surface,
    colour,
)
from selfkd.reporting.figures.svg import Axis, linear_axis, log_axis

ACCURACY = Measure("accuracy")
GAINS = [
    Gain("generation 0", Bar(0.0), {1: 0.0, 2: 0.0}, 0, True),
    Gain("generation 1", Bar(0.01, 0.005, 0.015), {1: 0.008, 2: 0.012}, 1, True),
    Gain("generation 2", Bar(0.002, -0.01, 0.014), {1: -0.004, 2: 0.008}, 2),
]


def parsed(figure: Figure) -> Tree.Element:
    return Tree.fromstring(str(figure.markup()))


def marks(figure: Figure, name: str, style: str) -> list[Tree.Element]:
    """Return the elements of a tag that have a class."""
    return [e for e in parsed(figure).iter(name) if style in e.get("class", "").split()]


def tips(figure: Figure, style: str) -> list[str]:
    return [e.findtext("title", "") for e in marks(figure, "circle", style)]


def texts(figure: Figure) -> list[str]:
    return [element.text or "" for element in parsed(figure).iter("text")]


def numbers(figure: Figure) -> Iterator[float]:
    """Yield all places of a figure."""
    for element in parsed(figure).iter():
        for key in ("cx", "cy", "x1", "x2", "y1", "y2", "x", "y", "width", "height"):
            if key in element.keys():  # noqa: SIM118 - of an element
                yield float(element.get(key, "").rstrip("%"))


def gains(beside: Sequence[Gain] = ()) -> Figure:
    return charts.gains(GAINS, beside, measure=ACCURACY, title="gain", axis="points")


def test_each_seed_is_a_line_from_zero_and_each_mean_has_its_interval() -> None:
    lines = [e.get("points", "").split() for e in marks(gains(), "polyline", "seed")]
    assert [len(line) for line in lines] == [3, 3]
    (zero,) = marks(gains(), "line", "zero")
    assert lines[0][0].split(",")[1] == lines[1][0].split(",")[1] == zero.get("y1")
    assert len(marks(gains(), "path", "whisker")) == 2
    assert tips(gains(), "mark") == ["generation 0: +0.00", "generation 1: +1.00 [+0.50, +1.50]"]
    assert tips(gains(), "open") == ["generation 2: +0.20 [−1.00, +1.40]"]
    assert {"+1.00", "+0.20"} <= set(texts(gains()))


def test_controls_stand_beside_on_the_same_scale_and_do_not_squeeze_it() -> None:
    far = [Gain("ensemble", Bar(0.4, 0.3, 0.5)), Gain("label smoothing", Bar(0.001, 0, 0.002))]
    figure = gains(far)
    main, side = figure.parts
    assert (main.y.low, main.y.high) == (side.y.low, side.y.high)
    assert main.y.high < 6  # points
    (arrow,) = marks(figure, "path", "open")
    assert arrow.findtext("title") == "ensemble: +40.00 [+30.00, +50.00]"
    assert "label" in texts(figure)


def test_all_trials_are_points_and_the_choice_stands_on_its_own() -> None:
    rows = [(0, [(0, 0.94), (1, 0.95)], 1), (1, [(0, 0.96), (1, 0.1)], 0)]
    figure = charts.trials(rows, measure=ACCURACY)
    assert tips(figure, "ring") == [
        "generation 0, trial 1: 95.00%, chosen",
        "generation 1, trial 0: 96.00%, chosen",
    ]
    assert tips(figure, "pale") == ["generation 0, trial 0: 94.00%"]
    # a trial that came to nothing does not squeeze the rest
    (arrow,) = marks(figure, "path", "mark")
    assert arrow.findtext("title") == "generation 1, trial 1: 10.00%"
    assert figure.parts[0].y.low > 0.8


def test_generations_have_the_same_colours_everywhere() -> None:
    learning = charts.curves([Line("a", [1, 2], [0.1, 0.2], 1)], x="epoch", measure=ACCURACY)
    sure = charts.reliability([(1, "generation 1", [(0.5, 0.4, 3)])])
    for figure, name in ((gains(), "circle"), (learning, "polyline"), (sure, "circle")):
        assert marks(figure, name, colour(1))
    assert len({colour(number) for number in range(2 * COLOURS + 1)}) == 2 * COLOURS + 1


def test_a_map_marks_the_choice_and_takes_a_surface() -> None:
    points = [
        Setting(1.0, 0.0, -0.02, "1", "worst"),
        Setting(20.0, 1.0, 0.02, "2", "best", chosen=True),
        Setting(5.0, 0.5, 0.0, "3", "middle"),
    ]
    surface = Surface([1, 20], [0, 1], [[-0.02, 0.0], [0.0, 0.02]])
    figure = charts.setting_map(points, measure=ACCURACY, surface=surface)
    assert len(marks(figure, "circle", "trial")) == 2
    (chosen,) = marks(figure, "circle", "chosen")
    assert chosen.findtext("title") == "best"
    assert "v6" in chosen.get("class", "")
    fills = [e.get("fill") for e in parsed(figure).iter("rect")]
    assert fills == [charts.SCALE[0], charts.SCALE[3], charts.SCALE[3], charts.SCALE[6]]
    assert [e.text for e in marks(figure, "text", "digit")] == ["1", "3", "2"]


def test_the_colours_of_a_map_turn_where_less_is_better() -> None:
    loss = Measure("NLL", percent=False, larger_is_better=False)
    points = [Setting(1.0, 0.0, -0.1, "1"), Setting(2.0, 0.5, 0.1, "1")]
    less, more = parsed(charts.setting_map(points, measure=loss)).iter("circle")
    assert "v6" in less.get("class", "")
    assert "v0" in more.get("class", "")


def test_reliability_has_its_counts() -> None:
    bins = [(0.55, 0.4, 3), (0.95, 0.9, 30)]
    figure = charts.reliability([(0, "a", bins), (1, "b", bins)])
    bars = marks(figure, "rect", "bar")
    heights = [float(bar.get("height", "")) for bar in bars]
    assert heights[1] == pytest.approx(10 * heights[0], rel=0.02)
    assert "b: accuracy 90.0% at confidence 95.0%, 30 images" in tips(figure, "mark")


def test_names_are_no_markup() -> None:
    evil = "<a href='javascript:alert(1)'>x</a>"
    for figure in (
        charts.levels([Level(evil, Bar(0.5))], measure=ACCURACY),
        charts.class_accuracy([evil], [(0, "generation 0", [0.5])]),
        charts.curves([Line(evil, [1], [1])], x="epoch", measure=Measure(evil)),
        gains([Gain(evil, Bar(0.1))]),
    ):
        assert "<a" not in figure.markup()
        assert "&lt;a" in figure.markup()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 1e308, -1e308, 1e300, 1e-320, 0])
def test_any_number_is_drawn_near_the_frame_or_not_at_all(value: float) -> None:
    bar = Bar(value, value, value)
    rows = [Gain("generation 0", Bar(0)), Gain("generation 1", bar, {1: value}, 1)]
    for figure in (
        charts.gains(rows, rows, measure=ACCURACY, title="", axis=""),
        charts.trials([(0, [(0, value), (1, 0.5)], 0)], measure=ACCURACY),
        charts.curves([Line("a", [1, 2], [value, 1])], x="epoch", measure=ACCURACY),
        charts.curves([Line("a", [1, 2], [value, 1])], x="e", measure=ACCURACY, logarithmic=True),
        charts.levels([Level("a", bar, (value,))], measure=ACCURACY, reference=0),
        charts.class_accuracy(["a"], [(0, "b", [value])]),
        charts.over_parameters([("a", 1, [(value, bar, (value,))])], measure=ACCURACY),
        charts.setting_map([Setting(abs(value) or 1, value, value, "1")], measure=ACCURACY),
    ):
        for number in numbers(figure):
            assert abs(number) < 5000


def test_nothing_is_drawn_of_nothing() -> None:
    assert parsed(charts.trials([(0, [], None)], measure=ACCURACY)) is not None
    assert parsed(charts.setting_map([], measure=ACCURACY)) is not None
    assert parsed(charts.curves([], x="epoch", measure=ACCURACY)) is not None


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-3.2, 5.1), (0.913, 0.917), (2e5, 9e6), (7, 7)])
def test_ticks_are_few_round_and_within(low: float, high: float) -> None:
    axis = linear_axis((low, high))
    assert 2 <= len(axis.ticks) <= 8
    assert all(axis.low - 1e-9 <= value <= axis.high + 1e-9 for value, _ in axis.ticks)
    assert len({text for _, text in axis.ticks}) == len(axis.ticks)


def test_a_place_far_outside_stays_near() -> None:
    assert Axis(0, 1).at(1e99) == 1.5
    assert log_axis((1.0, 100.0)).at(0) == -0.5
