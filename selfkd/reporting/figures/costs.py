"""Quality over what it costs: a labelled point a model."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from selfkd.reporting.figures.charts import padded
from selfkd.reporting.figures.style import Bar, Figure, Measure, colour
from selfkd.reporting.figures.svg import Drawing, ends_of, linear_axis, log_axis

HEIGHT = 290
LINE = 14
"""Pixels between the lines of labels."""

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
        shifts = _shifts([(x.at(cost), y.at(bar.value)) for _, cost, bar in points])
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


def _shifts(places: Sequence[tuple[float, float]]) -> list[float]:
    """Return how far labels are moved downwards, so that none covers another on its side.

    >>> _shifts([(0.1, 0.5), (0.2, 0.5), (0.9, 0.5)])
    [-3.0, 11.0, 4.0]
    """
    found = [4.0] * len(places)
    for right in (False, True):
        side = sorted(
            (n for n, (x, _) in enumerate(places) if (x > 0.5) == right),
            key=lambda n: (-places[n][1], places[n][0]),
        )
        at = [HEIGHT * (1 - places[n][1]) for n in side]
        rows = list(accumulate(at, lambda above, own: max(own, above + LINE)))
        down = [row - own for row, own in zip(rows, at, strict=True)]
        for n, own in zip(side, down, strict=True):
            found[n] += own - max(down) / 2
    return found
