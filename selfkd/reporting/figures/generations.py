"""Figures of generations: pure functions of plain data. Accuracies are fractions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import plotly.graph_objects as go

from selfkd.reporting.figures.style import (
    ACCENT,
    NEUTRAL,
    SCALE,
    Bar,
    Level,
    Line,
    Measure,
    Step,
    Surface,
    axis,
    ends_of,
    error_bar,
    finite,
    generation_colour,
    generation_dash,
    layout,
    literal,
    wrapped,
)

RING = "#d55e00"
"""Colour of the ring around a chosen trial, which is in no scale of colours."""
JITTER = 0.24
"""Width of a generation's trials around its number."""


def accuracy_per_generation(
    steps: Sequence[Step],
    *,
    measure: Measure,
    ensemble: float | None = None,
    controls: Sequence[Level] = (),
) -> go.Figure:
    """Draw each generation: its trials, the chosen one, test accuracy, mean over fresh seeds.

    Args:
        steps: Generations in order.
        measure: Metric that the trials are chosen by.
        ensemble: Test accuracy of the ensemble of all generations.
        controls: Controls of equal cost, on test.
    """
    floor, ceiling = _window(steps, ensemble, controls)
    figure = go.Figure(_trial_dots(steps, floor, measure))
    widest = _widest(steps)
    chosen = [(s.number, _spot(s, s.chosen[0], widest), s.chosen[1]) for s in steps if s.chosen]
    tested = [(s.number, float(s.number), s.test) for s in steps if s.test is not None]
    if chosen:
        figure.add_trace(_symbols("chosen, validation", chosen, "circle-open", 11, measure))
    if tested:
        figure.add_trace(_symbols("chosen, test", tested, "diamond", 9, measure))
    means = [(s.number, s.confirmed) for s in steps if s.confirmed is not None]
    if means:
        colours = [generation_colour(number) for number, _ in means]
        shifted = [(number + 0.3, bar) for number, bar in means]
        figure.add_traces(_bars("fresh seeds, test", shifted, colours, measure))
    last = max((s.number for s in steps), default=0)
    if controls:
        at = [(last + 1 + place, level.bar) for place, level in enumerate(controls)]
        figure.add_traces(_bars("controls, test", at, [NEUTRAL] * len(at), measure, "square-open"))
    right = last + len(controls) + 0.5
    if ensemble is not None:
        figure.add_trace(
            go.Scatter(
                x=[-0.5, right],
                y=[ensemble] * 2,
                mode="lines",
                name="ensemble of all, test",
                line={"color": ACCENT, "width": 1.5, "dash": "dash"},
                hovertemplate=f"ensemble: %{{y:{measure.format}}}<extra></extra>",
            )
        )
    figure.update_layout(
        layout(
            height=440,
            xaxis=axis(
                "generation",
                range=[-0.5, right],
                tickvals=list(range(last + 1 + len(controls))),
                ticktext=[str(n) for n in range(last + 1)]
                + [wrapped(level.name, 14) for level in controls],
                showgrid=False,
            ),
            yaxis=axis(measure.title, range=[floor, ceiling], tickformat=measure.tick),
        )
    )
    return figure


def _window(
    steps: Sequence[Step], ensemble: float | None, controls: Sequence[Level]
) -> tuple[float, float]:
    """Return a range of y that is not stretched to a trial that failed to learn."""
    bars = [s.confirmed for s in steps if s.confirmed is not None] + [c.bar for c in controls]
    ends = [end for bar in bars for end in (bar.value, bar.low, bar.high)]
    values = finite(
        [*(s.chosen[1] for s in steps if s.chosen), *(s.test for s in steps), ensemble, *ends]
    )
    tried = finite([value for s in steps for _, value in s.trials])
    if not values:
        values = tried or [0.0, 1.0]
    low, high = min(values), max([*values, *tried])
    spread = max(high - low, 1e-3 * max(abs(high), 1e-9))
    return max(low - 0.6 * spread, min([low, *tried]) - 0.08 * spread), high + 0.1 * spread


def _trial_dots(steps: Sequence[Step], floor: float, measure: Measure) -> go.Scatter:
    widest = _widest(steps)
    dots = [
        (step.number, trial, _spot(step, trial, widest), value)
        for step in steps
        for trial, value in step.trials
        if math.isfinite(value)
    ]
    return go.Scatter(
        x=[spot for _, _, spot, _ in dots],
        y=[max(value, floor) for *_, value in dots],
        mode="markers",
        name="each trial, validation",
        marker={
            "color": [generation_colour(number) for number, *_ in dots],
            "opacity": 0.45,
            "size": 6,
            "symbol": ["circle" if value >= floor else "triangle-down" for *_, value in dots],
        },
        cliponaxis=False,
        customdata=[[number, trial, value] for number, trial, _, value in dots],
        hovertemplate="generation %{customdata[0]}, trial %{customdata[1]}: "
        f"%{{customdata[2]:{measure.format}}}<extra></extra>",
    )


def _widest(steps: Sequence[Step]) -> int:
    return max((trial + 1 for step in steps for trial, _ in step.trials), default=1)


def _spot(step: Step, trial: int, widest: int) -> float:
    """Return the x of a trial, beside its generation's number."""
    return step.number + JITTER * (2 * (trial + 0.5) / widest - 1)


def _symbols(
    name: str,
    points: Sequence[tuple[int, float, float]],
    symbol: str,
    size: int,
    measure: Measure,
) -> go.Scatter:
    """Return one symbol for each point of generation, x and y."""
    colours = [generation_colour(number) for number, _, _ in points]
    return go.Scatter(
        x=[x for _, x, _ in points],
        y=[y for _, _, y in points],
        mode="markers",
        name=name,
        marker={
            "color": colours,
            "size": size,
            "symbol": symbol,
            "line": {"width": 2, "color": colours},
        },
        customdata=[number for number, _, _ in points],
        hovertemplate=f"generation %{{customdata}}, {name}: %{{y:{measure.format}}}<extra></extra>",
    )


def _bars(
    name: str,
    points: Sequence[tuple[float, Bar]],
    colours: Sequence[str],
    measure: Measure,
    symbol: str = "square",
) -> list[go.Scatter]:
    """Return a trace for each bar, as plotly's error bars have one colour; one legend entry."""
    return [
        go.Scatter(
            x=[x],
            y=[bar.value],
            error_y=error_bar(bar),
            mode="markers",
            name=f"{name}, 95 % interval",
            legendgroup=name,
            showlegend=place == 0,
            marker={"color": colour, "size": 8, "symbol": symbol},
            hovertemplate=f"{name}: %{{y:{measure.format}}}<extra></extra>",
        )
        for place, ((x, bar), colour) in enumerate(zip(points, colours, strict=True))
    ]


def setting_map(
    points: Sequence[tuple[float, float, float]],
    *,
    measure: Measure,
    chosen: tuple[float, float] | None = None,
    bounds: tuple[float, float] | None = None,
    temperatures: tuple[float, float] | None = None,
    surface: Surface | None = None,
) -> go.Figure:
    """Draw trials over T and alpha, coloured by their metric.

    Args:
        points: T, alpha and validation metric of each trial.
        measure: Metric of the trials.
        chosen: T and alpha of the chosen trial.
        bounds: Ends of the scale of colours, the same for all generations.
        temperatures: Least and largest T of the axis.
        surface: Response that was fitted to the points, drawn beneath them.
    """
    low, high = bounds or ends_of([value for _, _, value in points])
    colours = {"coloraxis": "coloraxis"}
    figure = go.Figure()
    if surface is not None:
        figure.add_trace(
            go.Contour(
                x=list(surface.temperatures),
                y=list(surface.alphas),
                z=[list(row) for row in surface.values],
                contours={"coloring": "heatmap"},
                line={"width": 0},
                opacity=0.6,
                hoverinfo="skip",
                **colours,
            )
        )
    figure.add_trace(
        go.Scatter(
            x=[t for t, _, _ in points],
            y=[alpha for _, alpha, _ in points],
            mode="markers",
            marker={
                "color": [value for _, _, value in points],
                "size": 13,
                "line": {"width": 1, "color": NEUTRAL},
                **colours,
            },
            cliponaxis=False,
            hovertemplate="T %{x:.3g}, alpha %{y:.2f}: "
            f"%{{marker.color:{measure.format}}}<extra></extra>",
        )
    )
    if chosen is not None:
        figure.add_trace(
            go.Scatter(
                x=[chosen[0]],
                y=[chosen[1]],
                mode="markers",
                marker={
                    "size": 22,
                    "symbol": "circle-open",
                    "color": RING,
                    "line": {"width": 2.5, "color": RING},
                },
                cliponaxis=False,
                hoverinfo="skip",
            )
        )
    least, most = temperatures or ends_of([t for t, _, _ in points])
    margin = 0.06 * max(math.log10(most / least), 0.2)
    figure.update_layout(
        layout(
            height=300,
            legend=False,
            xaxis=axis(
                "T",
                type="log",
                range=[math.log10(least) - margin, math.log10(most) + margin],
                tickvals=[1, 2, 3, 5, 10, 20, 50, 100],
            ),
            yaxis=axis("alpha", range=[-0.06, 1.06], tickvals=[0, 0.25, 0.5, 0.75, 1]),
            coloraxis={
                "colorscale": SCALE,
                "cmin": low,
                "cmax": high,
                "reversescale": not measure.larger_is_better,
                "colorbar": {
                    "thickness": 10,
                    "outlinewidth": 0,
                    "tickformat": measure.tick,
                    "nticks": 5,
                },
            },
        )
    )
    return figure


def curves(
    lines: Sequence[Line], *, x: str, measure: Measure, logarithmic: bool = False
) -> go.Figure:
    """Draw curves, such as learning curves; steep first epochs may begin below the frame."""
    figure = go.Figure(
        [
            go.Scatter(
                x=list(line.x),
                y=list(line.y),
                mode="lines" if len(line.x) > 1 else "markers",
                name=literal(line.name),
                line={
                    "color": generation_colour(line.number),
                    "width": 2,
                    "dash": generation_dash(line.number),
                },
                hovertemplate=f"{literal(line.name)}, {x} %{{x}}: "
                f"%{{y:{measure.format}}}<extra></extra>",
            )
            for line in lines
        ]
    )
    longest = max((len(line.x) for line in lines), default=0)
    scale: dict[str, Any] = {"type": "log", "dtick": "D2"} if logarithmic else {}
    settled = finite([y for line in lines for y in line.y[len(line.y) // 4 :]])
    if settled and not logarithmic:
        low, high = min(settled), max(settled)
        margin = 0.08 * max(high - low, 1e-3 * abs(high), 1e-9)
        scale = {"range": [low - margin, high + margin]}
    figure.update_layout(
        layout(
            height=340,
            xaxis=axis(x, showgrid=False, tickformat="d", **({"dtick": 1} if longest < 12 else {})),
            yaxis=axis(measure.title, tickformat=measure.tick, **scale),
        )
    )
    return figure


def reliability(
    models: Sequence[tuple[int, str, Sequence[tuple[float, float, int]]]],
    *,
    unit: str = "images",
) -> go.Figure:
    """Draw reliability diagrams: accuracy over confidence, a curve a model.

    Args:
        models: Number and title of each, with mean confidence, accuracy and count of its bins.
        unit: Word for the items.

    Reference:
        Guo et al., "On Calibration of Modern Neural Networks", 2017,
        https://arxiv.org/abs/1706.04599
    """
    figure = go.Figure(
        go.Scatter(
            x=[0, 1],
            y=[0, 1],
            mode="lines",
            name="perfect calibration",
            line={"color": NEUTRAL, "width": 1, "dash": "dot"},
            hoverinfo="skip",
        )
    )
    most = max((count for *_, bins in models for _, _, count in bins), default=1)
    for number, title, bins in models:
        figure.add_trace(
            go.Scatter(
                x=[confidence for confidence, _, _ in bins],
                y=[accuracy for _, accuracy, _ in bins],
                mode="lines+markers",
                name=title,
                line={
                    "color": generation_colour(number),
                    "width": 1,
                    "dash": generation_dash(number),
                },
                marker={"size": [5 + 13 * math.sqrt(count / most) for _, _, count in bins]},
                customdata=[count for _, _, count in bins],
                hovertemplate=f"{title}: accuracy %{{y:.1%}} at confidence %{{x:.1%}}, "
                f"%{{customdata}} {unit}<extra></extra>",
            )
        )
    ends: dict[str, Any] = {"range": [-0.02, 1.04], "tickformat": "~%"}
    figure.update_layout(
        layout(height=380, xaxis=axis("confidence", **ends), yaxis=axis("accuracy", **ends))
    )
    return figure
