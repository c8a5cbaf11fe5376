"""Quality over what it costs: a labelled point a model."""

from __future__ import annotations

from collections.abc import Sequence

from selfkd.reporting.figures.charts import padded
from selfkd.reporting.figures.style import Bar, Figure, Measure, colour
from selfkd.reporting.figures.svg import Drawing, ends_of, linear_axis, log_axis

HEIGHT = 290
LINE = 13
"""Pixels between the lines of labels."""
LETTER = 0.017
"""Width of a letter of a label, in widths of a drawing beside another."""
DOT = 0.015
"""Half the width of a point, likewise."""

Costed = tuple[str, float, Bar]
"""Name of a model, what it costs, its metric."""


def over_costs(costs: Sequence[tuple[str, Sequence[Costed]]], *, measure: Measure) -> Figure:
    """Draw a metric over each cost, on a logarithmic axis.

    Args:
        costs: Titles of the axes, such as bytes, with the points over each.
        measure: Metric of the points.
    """
    names = list(dict.fromkeys(name for _, points in costs for name, *_ in points))
    bars = [bar for _, points in costs for *_, bar in points]
    y = linear_axis(
        padded(
            ends_of([end for bar in bars for end in (bar.value, bar.low, bar.high)]), least=1e-3
        ),
        measure.axis,
        percent=measure.percent,
    )
    drawings = []
    for title, points in costs:
        low, high = ends_of([cost for _, cost, _ in points])
        x = log_axis((low / 1.4, high * 1.4), title)
        drawing = Drawing(x, y, HEIGHT, f"{measure.title} over {title}")
        shifts = _shifts([(x.at(cost), y.at(bar.value), name) for name, cost, bar in points])
        for (name, cost, bar), shift in zip(points, shifts, strict=True):
            style = colour(names.index(name))
            if bar.low is not None and bar.high is not None:
                drawing.whisker(cost, bar.low, bar.high, f"whisker {style}")
            tip = f"{name}: {measure.text(bar.value)}, {title} {cost:,.3g}"
            drawing.dot(cost, bar.value, f"{style} mark", tip, r=5)
            right = x.at(cost) > 0.5  # room is on the left of it
            aside = "value end" if right else "value"
            drawing.text(cost, bar.value, name, aside, shift=(-9 if right else 9, shift))
        drawings.append(drawing)
    return Figure(tuple(drawings))


def _shifts(places: Sequence[tuple[float, float, str]]) -> list[float]:
    """Return how far labels are moved downwards, so that none covers another, or a point.

    Args:
        places: Place of each point, in shares of the width and the height, with its label.

    >>> _shifts([(0.1, 0.5, "a"), (0.12, 0.5, "b"), (0.4, 0.5, "c")])
    [17.0, 4.0, 4.0]
    """
    taken = [(x - DOT, x + DOT, HEIGHT * (1 - y)) for x, y, _ in places]
    found = []
    tries = sorted(range(-2 * len(places), 2 * len(places) + 1), key=lambda n: (abs(n), -n))
    for x, y, label in places:
        width = LETTER * (len(label) + 3)
        left = x - DOT - width if x > 0.5 else x + DOT
        over = [row for low, high, row in taken if left < high and low < left + width]
        rows = (HEIGHT * (1 - y) + LINE * n for n in tries)
        row = next(row for row in rows if all(abs(row - other) >= LINE for other in over))
        taken.append((left, left + width, row))
        found.append(4 + row - HEIGHT * (1 - y))
    return found
