"""The figures of reports: pure functions of plain data. Accuracies are fractions."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

from selfkd.reporting.figures.style import (
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
from selfkd.reporting.figures.svg import (
    Axis,
    Drawing,
    category_axis,
    ends_of,
    finite,
    linear_axis,
    log_axis,
)

JITTER = 0.28
"""Half the width of a generation's trials around its number."""


def padded(
    ends: tuple[float, float], share: float = 0.08, *, least: float = 1e-9
) -> tuple[float, float]:
    """Return a range that is wider by a share on either side."""
    margin = share * max(ends[1] - ends[0], least)
    return ends[0] - margin, ends[1] + margin


def gains(
    rows: Sequence[Gain], beside: Sequence[Gain], *, measure: Measure, title: str, axis: str
) -> Figure:
    """Draw gains over generation 0: each seed a thin line, the means with their intervals.

    Args:
        rows: Generations in order, generation 0 first.
        beside: Controls and ensembles, on the same scale. What lies far outside the range of the
            generations is drawn at its edge.
        measure: Metric of the gains.
        title: Accessible name.
        axis: Title of the axis.
    """
    ends = ends_of([0.0, *(end for row in rows for end in _ends(row))])
    spread = max(ends[1] - ends[0], 1e-4)
    outside = ends_of([*ends, *(row.bar.value for row in beside)])
    window = max(outside[0], ends[0] - spread), min(outside[1], ends[1] + spread)
    factor = 100 if measure.percent else 1
    y = linear_axis(_scaled(padded(window, least=1e-3), factor), axis, sign=True)
    names = [str(row.number) for row in rows]
    main = Drawing(category_axis(names, "generation"), y, 290, title, share=len(rows))
    main.rule(y=0, style="zero")
    for seed in sorted({seed for row in rows for seed in row.seeds}):
        points = [
            (place, factor * row.seeds[seed]) for place, row in enumerate(rows) if seed in row.seeds
        ]
        main.line(points, "seed")
        for place, value in points if rows[0].number else points[1:]:
            main.dot(place, value, "faint", f"seed {seed}: {measure.change(value / factor)}", r=2)
    _means(main, rows, factor, measure)
    if not beside:
        return Figure((main,))
    names = [row.name for row in beside]
    lines = max(name.count(" ") for name in names) + 1
    side = Drawing(
        *(category_axis(names), replace(y, title="beside it"), 290),
        f"Beside it: {', '.join(names)}",
        bottom=max(40, 14 + 13 * min(lines, 4)),
        share=max(len(beside), math.ceil(len(rows) / 4)),
    )
    main.bottom = max(main.bottom, side.bottom)
    side.bottom = main.bottom
    side.rule(y=0, style="zero")
    for place, row in enumerate(beside):
        for seed, value in row.seeds.items():
            tip = f"{row.name}, seed {seed}: {measure.change(value)}"
            if y.low <= factor * value <= y.high:
                side.dot(place, factor * value, "faint", tip, r=2)
    _means(side, beside, factor, measure)
    return Figure((main, side))


def _ends(row: Gain) -> list[float | None]:
    return [row.bar.value, row.bar.low, row.bar.high, *row.seeds.values()]


def _scaled(ends: tuple[float, float], factor: float) -> tuple[float, float]:
    return factor * ends[0], factor * ends[1]


def _means(drawing: Drawing, rows: Sequence[Gain], factor: float, measure: Measure) -> None:
    """Draw means with their intervals, cut at the frame, each with its value beside it."""
    low, high = drawing.y.low, drawing.y.high
    for place, row in enumerate(rows):
        bar = row.bar
        if not finite([bar.value]):
            continue
        value, text = factor * bar.value, measure.gain(bar.value).replace("-", "−")
        tip = f"{row.name}: {text}"
        style = f"{colour(row.number)} {'mark' if row.established else 'open'}"
        if finite([bar.low]) and finite([bar.high]):
            of = [measure.gain(end or 0.0) for end in (bar.low, bar.high)]
            tip += f" [{', '.join(of).replace('-', '−')}]"
            ends = (factor * (bar.low or 0.0), factor * (bar.high or 0.0))
            if ends[0] < high and ends[1] > low:
                drawing.whisker(
                    *(place, max(ends[0], low), min(ends[1], high)),
                    f"whisker {colour(row.number)}",
                )
        if low <= value <= high:
            drawing.dot(place, value, style, tip, r=5.5)
        else:
            value = high if value > high else low
            drawing.symbol("up" if value == high else "down", place, value, style, tip)
        if bar.value:  # not of what all others are compared with
            drawing.text(place, value, text, "value", shift=(9, 4))


def trials(
    rows: Sequence[tuple[int, Sequence[tuple[int, float]], int | None]], *, measure: Measure
) -> Figure:
    """Draw each trial of each generation by its metric on validation, the chosen one larger.

    Args:
        rows: Number of each generation, number and metric of its trials, number of the chosen one.
        measure: Metric of the trials.
    """
    chosen = [value for _, found, best in rows for number, value in found if number == best]
    known = finite(chosen or [value for _, found, _ in rows for _, value in found])
    every = finite([value for _, found, _ in rows for _, value in found])
    low, high = ends_of([*known, *every])
    if known and every:  # not stretched to a trial that failed to learn
        spread = max(max(every) - min(known), 1e-3 * max(abs(max(every)), 1e-9))
        if measure.larger_is_better:
            low = max(low, min(known) - 3 * spread)
        else:
            spread = max(max(known) - min(every), 1e-3)
            high = min(high, max(known) + 3 * spread)
    y = linear_axis(padded((low, high), least=1e-3), measure.axis, percent=measure.percent)
    names = [str(number) for number, _, _ in rows]
    drawing = Drawing(category_axis(names, "generation"), y, 320, "Each trial by generation")
    for place, (generation, found, best) in enumerate(rows):
        widest = max((number for number, _ in found), default=0) + 1
        for number, value in found:
            x = place + JITTER * (2 * (number + 0.5) / widest - 1)
            tip = f"generation {generation}, trial {number}: {measure.text(value)}"
            kept = min(max(value, low), high)
            if kept != value:
                side, style = "down" if value < low else "up", f"{colour(generation)} mark"
                drawing.symbol(side, x, kept, style, tip)
            elif number == best:
                drawing.dot(x, value, f"{colour(generation)} ring", f"{tip}, chosen", r=6)
            else:
                drawing.dot(x, value, f"{colour(generation)} pale", tip)
    return Figure((drawing,))


def setting_map(
    points: Sequence[Setting], *, measure: Measure, surface: Surface | None = None
) -> Figure:
    """Draw the trials of all generations over T and alpha, coloured against their generation.

    Args:
        points: Trials.
        measure: Metric of the trials.
        surface: Response that was fitted to them, drawn beneath.
    """
    most = max((abs(value) for value in finite([p.value for p in points])), default=0.0) or 1.0
    spread = sorted(abs(value) for value in finite([p.value for p in points]))
    scale = spread[int(0.9 * (len(spread) - 1))] if spread else most  # a failed trial is no scale
    scale = scale or most
    sign = 1 if measure.larger_is_better else -1
    temperatures = ends_of([p.temperature for p in points])
    if surface is not None:
        temperatures = ends_of([*temperatures, *surface.temperatures])
    low, high = (math.log(max(end, 1e-12)) for end in temperatures)
    low, high = padded((low, high), 0.06, least=0.5)
    x = log_axis((math.exp(low), math.exp(min(high, 30))), "temperature T")
    alphas = (0.0, 0.25, 0.5, 0.75, 1.0)
    y = Axis(-0.07, 1.07, tuple((alpha, f"{alpha:g}") for alpha in alphas), "alpha")
    drawing = Drawing(x, y, 330, "Trials over T and alpha")
    if surface is not None:
        rows, columns = _edges(surface.alphas), _edges([math.log(t) for t in surface.temperatures])
        for row, values in enumerate(surface.values):
            for column, value in enumerate(values):
                span = math.exp(columns[column]), math.exp(columns[column + 1])
                style = f'fill="{_shade(sign * value / scale)}" fill-opacity="0.35"'
                drawing.cell(span, (rows[row], rows[row + 1]), style)
    for point in sorted(points, key=lambda each: each.chosen):
        if not finite([point.value]):
            continue
        here = (point.temperature, point.alpha)
        style = "chosen" if point.chosen else "trial"
        drawing.dot(*here, f"{style} {_step(sign * point.value / scale)}", point.tip, r=9)
        drawing.text(*here, point.label, "digit", shift=(0, 3.5))
    worse, better = (measure.gain(s * scale).replace("-", "−") for s in (-sign, sign))
    unit = " points" if measure.percent else ""
    legend = (
        (f"{worse}{unit} and less" if sign > 0 else f"{worse} and more", "v0"),
        ("mean", "v3"),
        (f"{better}{unit} and more" if sign > 0 else f"{better} and less", "v6"),
    )
    return Figure((drawing,), legend)


def _step(value: float) -> str:
    """Return the class of a value from -1, worst, to 1, best."""
    return f"v{round(3 + 3 * min(max(value, -1.0), 1.0))}" if math.isfinite(value) else "v3"


SCALE = ("#e0662a", "#eb8f57", "#f0bd9b", "#cfd4da", "#a3c8ea", "#6aa9df", "#3a86cf")
"""Orange to blue over grey: told apart with any colour vision, on light and dark; classes v0, …"""


def _shade(value: float) -> str:
    return SCALE[int(_step(value)[1:])]


def _edges(values: Sequence[float]) -> list[float]:
    """Return the borders of the cells around values."""
    if len(values) < 2:
        return [values[0] - 0.5, values[0] + 0.5]
    inner = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    return [values[0], *inner, values[-1]]


def curves(lines: Sequence[Line], *, x: str, measure: Measure, logarithmic: bool = False) -> Figure:
    """Draw curves, such as learning curves; steep first epochs may begin below the frame."""
    settled = finite([y for line in lines for y in line.y[len(line.y) // 4 :]])
    every = finite([y for line in lines for y in line.y])
    if logarithmic:
        y = log_axis(ends_of(every), measure.axis)
    else:
        y = linear_axis(
            padded(ends_of(settled or every), least=1e-3), measure.axis, percent=measure.percent
        )
    ends = ends_of([each for line in lines for each in line.x])
    drawing = Drawing(_whole_axis(ends, x), y, 250, f"{measure.title} by {x}")
    for line in lines:
        points = [
            (at, value)
            for at, value in zip(line.x, line.y, strict=True)
            if value is not None and finite([value])
        ]
        shown = [(at, max(value, y.low)) for at, value in points]
        drawing.line(shown, f"line {colour(line.number)}")
        for at, value in points if len(points) <= 40 else points[-1:]:
            tip = f"{line.name}, {x} {at:g}: {measure.text(value)}"
            if value >= y.low:
                alone = len(points) == 1
                style = f"{colour(line.number)} {'mark' if alone else 'target'}"
                drawing.dot(at, value, style, tip, r=4.5)
    return Figure((drawing,), tuple((line.name, colour(line.number)) for line in lines))


def _whole_axis(ends: tuple[float, float], title: str) -> Axis:
    """Return an axis of whole numbers."""
    low, high = padded(ends, 0.02, least=1)
    step = max(1, math.ceil((high - low) / 8))
    step = next((s for s in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if s >= step), step)
    first = math.ceil(low / step) * step
    numbers = range(first, math.floor(high) + 1, step)
    return Axis(low, high, tuple((number, str(number)) for number in numbers), title)


def over_parameters(
    arms: Sequence[tuple[str, int, Sequence[tuple[float, Bar, Sequence[float]]]]],
    *,
    measure: Measure,
    reference: float | None = None,
) -> Figure:
    """Draw values over the number of parameters, with intervals and the seeds behind them.

    Args:
        arms: Name and number of the colour of each, with parameters, mean and seeds' values of its
            sizes.
        measure: Metric of the values.
        reference: Value of a thin line, such as the teacher's.
    """
    bars = [(count, bar, values) for _, _, sizes in arms for count, bar, values in sizes]
    low, high = ends_of([count for count, *_ in bars])
    ends = ends_of([e for _, b, v in bars for e in (b.value, b.low, b.high, *v)] + [reference])
    drawing = Drawing(
        log_axis((low / 1.3, high * 1.3), "parameters"),
        linear_axis(padded(ends), measure.axis, percent=measure.percent),
        290,
        f"{measure.title} over parameters",
    )
    if reference is not None and finite([reference]):
        drawing.rule(y=reference, style="rule")
    for name, number, sizes in arms:
        style, aside = colour(number), 1.015 if number else 1 / 1.015
        drawing.line([(count * aside, mean.value) for count, mean, _ in sizes], f"line {style}")
        for parameters, mean, values in sizes:
            count = parameters * aside
            for value in values:
                tip = f"{name}, one seed: {measure.text(value)}"
                drawing.dot(count, value, f"{style} pale", tip, r=2.5)
            if mean.low is not None and mean.high is not None:
                drawing.whisker(count, mean.low, mean.high, f"whisker {style}")
            tip = f"{name}, {parameters:,.0f} parameters: {measure.text(mean.value)}"
            drawing.dot(count, mean.value, f"{style} mark", tip, r=5)
    names = [(name, colour(number)) for name, number, _ in arms]
    return Figure((drawing,), (*names, *([("teacher", "dotted")] if reference is not None else [])))


def levels(rows: Sequence[Level], *, measure: Measure, reference: float | None = None) -> Figure:
    """Draw named values below each other, with intervals and the values that they are means of.

    Args:
        rows: Values from top to bottom.
        measure: Metric of the values.
        reference: Value of a thin line, such as no difference.
    """
    numbers = [e for row in rows for e in (row.bar.value, row.bar.low, row.bar.high, *row.points)]
    drawing = _rows([row.name for row in rows], [*numbers, reference], measure)
    if reference is not None:
        drawing.rule(x=reference, style="zero")
    for place, row in enumerate(rows):
        y, bar = -place - 0.15, row.bar
        for value in row.points:
            tip = f"one model: {measure.text(value)}"
            drawing.dot(value, y, f"{colour(row.number)} pale", tip, r=3)
        if not finite([bar.value]):
            continue
        tip = f"{row.name}: {measure.text(bar.value)}"
        if bar.low is not None and bar.high is not None and len(finite([bar.low, bar.high])) == 2:
            drawing.across(y, bar.low, bar.high, f"whisker {colour(row.number)}")
            tip += f" [{measure.text(bar.low)}, {measure.text(bar.high)}]"
        drawing.dot(bar.value, y, f"{colour(row.number)} mark", tip, r=5)
    return Figure((drawing,))


def class_accuracy(
    classes: Sequence[str], models: Sequence[tuple[int, str, Sequence[float | None]]]
) -> Figure:
    """Draw accuracy by class, a dot a model.

    Args:
        classes: Names of the classes.
        models: Number and title of each model, with its accuracies by class.
    """
    measure = Measure("accuracy on test")
    drawing = _rows(classes, [v for _, _, values in models for v in values], measure)
    for place in range(len(classes)):
        span = finite([values[place] for _, _, values in models])
        if len(span) > 1:
            drawing.across(-place - 0.15, min(span), max(span), "seed", caps=False)
    for number, title, values in models:
        for place, value in enumerate(values):
            if value is not None and finite([value]):
                tip = f"{title}, {classes[place]}: {measure.text(value)}"
                drawing.dot(value, -place - 0.15, f"{colour(number)} mark", tip, r=4.5)
    return Figure((drawing,), tuple((title, colour(number)) for number, title, _ in models))


def _rows(names: Sequence[str], values: Sequence[float | None], measure: Measure) -> Drawing:
    """Return a drawing of rows, each below its name, which has room there on a phone as well."""
    x = linear_axis(padded(ends_of(values), 0.05), measure.axis, percent=measure.percent)
    y = Axis(-max(len(names), 1) + 0.4, 0.6)
    drawing = Drawing(x, y, 40 * max(len(names), 1), measure.title, left=6, grid=False)
    for value, _ in x.ticks:
        drawing.rule(x=value, style="grid")
    for place, name in enumerate(names):
        drawing.text(x.low, -place + 0.24, name, "name")
    return drawing


def reliability(
    models: Sequence[tuple[int, str, Sequence[tuple[float, float, int]]]], *, unit: str = "images"
) -> Figure:
    """Draw reliability diagrams, accuracy over confidence, and the counts behind them.

    Args:
        models: Number and title of each, with mean confidence, accuracy and count of its bins.
        unit: Word for the items.

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", 2017,
        https://arxiv.org/abs/1706.04599
    """
    ticks = tuple((share / 5, f"{20 * share}%") for share in range(6))
    x = Axis(-0.02, 1.02, ticks, "confidence")
    diagram = Drawing(x, Axis(-0.02, 1.04, ticks, "accuracy"), 290, "Accuracy over confidence")
    diagram.line([(0, 0), (1, 1)], "dotted")
    most = max((count for _, _, bins in models for *_, count in bins), default=1)
    counts = linear_axis((0.0, 1.05 * most), unit)
    bars = Drawing(x, counts, 290, f"Number of {unit} by confidence")
    wide = 0.9 / 15 / max(len(models), 1)
    for place, (number, title, bins) in enumerate(models):
        style = colour(number)
        diagram.line([(at, right) for at, right, _ in bins], f"line {style}")
        for at, right, count in bins:
            tip = f"{title}: accuracy {right:.1%} at confidence {at:.1%}, {count} {unit}"
            diagram.dot(at, right, f"{style} mark", tip, r=2.5 + 5 * math.sqrt(count / most))
            low = (math.floor(min(at, 0.999) * 15) + 0.05) / 15 + place * wide
            bars.cell((low, low + wide), (0.0, float(count)), f'class="bar {style}"')
    names = [(title, colour(number)) for number, title, _ in models]
    return Figure((diagram, bars), (*names, ("perfect calibration", "dotted")))
