"""Figures of counts, levels, sizes and classes. Pure functions of plain data."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go

from selfkd.reporting.figures.style import (
    NEUTRAL,
    Bar,
    Level,
    Measure,
    axis,
    ends_of,
    error_bar,
    generation_colour,
    layout,
    literal,
    shown,
    wrapped,
)


def dots_per_generation(values: Sequence[tuple[int, float]], *, measure: Measure) -> go.Figure:
    """Draw one value a generation, such as teacher agreement, with its number beside it."""
    figure = go.Figure(
        go.Scatter(
            x=[number for number, _ in values],
            y=[value for _, value in values],
            mode="lines+markers+text",
            text=[shown(value, measure) for _, value in values],
            textposition="top center",
            line={"color": NEUTRAL, "width": 1},
            marker={"size": 11, "color": [generation_colour(number) for number, _ in values]},
            cliponaxis=False,
            hovertemplate=f"generation %{{x}}: %{{y:{measure.format}}}<extra></extra>",
        )
    )
    low, high = ends_of([value for _, value in values])
    margin = 0.35 * max(high - low, 0.002)
    numbers = [number for number, _ in values]
    figure.update_layout(
        layout(
            height=300,
            legend=False,
            xaxis=axis(
                "generation",
                tickvals=numbers,
                range=[min(numbers) - 0.5, max(numbers) + 0.5],
                showgrid=False,
            ),
            yaxis=axis(measure.title, range=[low - margin, high + margin], tickformat=measure.tick),
        )
    )
    return figure


def counts(
    rows: Sequence[str], columns: Sequence[str], values: Sequence[Sequence[int | None]]
) -> go.Figure:
    """Draw a table of counts, such as pairs of classes by model, darker where there are more."""
    figure = go.Figure(
        go.Heatmap(
            x=[literal(name) for name in columns],
            y=[literal(name) for name in rows],
            z=[list(row) for row in values],
            text=[["" if v is None else str(v) for v in row] for row in values],
            texttemplate="%{text}",
            colorscale=[[0, "rgba(31,119,196,0.06)"], [1, "rgba(31,119,196,0.75)"]],
            showscale=False,
            xgap=2,
            ygap=2,
            hovertemplate="%{y}, %{x}: %{z}<extra></extra>",
        )
    )
    figure.update_layout(
        layout(
            height=64 + 28 * len(rows),
            margin={"l": 56, "r": 12, "t": 44, "b": 8},
            legend=False,
            xaxis=axis("", type="category", side="top", showgrid=False, showline=False, ticks=""),
            yaxis=axis(
                "", type="category", autorange="reversed", showgrid=False, showline=False, ticks=""
            ),
        )
    )
    return figure


def class_accuracy(
    classes: Sequence[str], models: Sequence[tuple[int, str, Sequence[float | None]]]
) -> go.Figure:
    """Draw accuracy by class, a dot a model.

    Args:
        classes: Names of the classes.
        models: Number and title of each model, with its accuracies by class.
    """
    names = [literal(name) for name in classes]
    figure = go.Figure(
        [
            go.Scatter(
                x=list(values),
                y=names,
                mode="markers",
                name=title,
                marker={
                    "color": generation_colour(number),
                    "size": 10,
                    "opacity": 0.85,
                    "symbol": ("circle", "diamond", "square", "cross")[number % 4],
                },
                hovertemplate=f"{title}, %{{y}}: %{{x:.2%}}<extra></extra>",
            )
            for number, title, values in models
        ]
    )
    figure.update_layout(
        layout(
            height=120 + 24 * len(names),
            xaxis=axis("accuracy on test", tickformat="~%"),
            yaxis=axis("", type="category", autorange="reversed", ticks=""),
        )
    )
    return figure


def over_parameters(
    arms: Sequence[tuple[str, str, Sequence[tuple[float, Bar, Sequence[float]]]]],
    *,
    measure: Measure,
    reference: float | None = None,
) -> go.Figure:
    """Draw values over the number of parameters, with intervals and the seeds behind them.

    Args:
        arms: Name and colour of each, with parameters, mean and seeds' values of its sizes.
        measure: Metric of the values.
        reference: Value of a thin line, such as the teacher's.
    """
    figure = go.Figure()
    for name, colour, sizes in arms:
        figure.add_trace(
            go.Scatter(
                x=[count for count, _, values in sizes for _ in values],
                y=[value for *_, values in sizes for value in values],
                mode="markers",
                marker={"color": colour, "size": 6, "opacity": 0.4},
                showlegend=False,
                hovertemplate=f"{name}, one seed: %{{y:{measure.format}}}<extra></extra>",
            )
        )
        bars = [error_bar(mean) for _, mean, _ in sizes]
        figure.add_trace(
            go.Scatter(
                x=[count for count, *_ in sizes],
                y=[mean.value for _, mean, _ in sizes],
                error_y={
                    **next((each for each in bars if "array" in each), {"visible": False}),
                    "array": [each.get("array", [0])[0] for each in bars],
                    "arrayminus": [each.get("arrayminus", [0])[0] for each in bars],
                },
                mode="lines+markers",
                name=name,
                line={"color": colour, "width": 1.5},
                marker={"color": colour, "size": 9},
                hovertemplate=f"{name}, %{{x:,}} parameters: %{{y:{measure.format}}}"
                "<extra></extra>",
            )
        )
    if reference is not None:
        figure.add_hline(y=reference, line={"color": NEUTRAL, "width": 1, "dash": "dot"})
    figure.update_layout(
        layout(
            height=380,
            xaxis=axis("parameters", type="log"),
            yaxis=axis(measure.title, tickformat=measure.tick),
        )
    )
    return figure


def levels(
    rows: Sequence[Level],
    *,
    measure: Measure,
    reference: float | None = None,
    ends: tuple[float, float] | None = None,
) -> go.Figure:
    """Draw named values below each other, with intervals and the values that they are means of.

    Args:
        rows: Values from top to bottom.
        measure: Metric of the values.
        reference: Value of a thin line, such as no difference.
        ends: Ends of the axis, at which intervals are cut.
    """
    names = [wrapped(row.name, 22) for row in rows]
    figure = go.Figure()
    for name, row in zip(names, rows, strict=True):
        figure.add_trace(
            go.Scatter(
                x=list(row.points),
                y=[name] * len(row.points),
                mode="markers",
                marker={"color": row.colour, "size": 6, "opacity": 0.4},
                hovertemplate=f"one model: %{{x:{measure.format}}}<extra></extra>",
            )
        )
        figure.add_trace(
            go.Scatter(
                x=[row.bar.value],
                y=[name],
                error_x=error_bar(row.bar, ends=ends),
                mode="markers",
                marker={"color": row.colour, "size": 10, "symbol": "square"},
                hovertemplate=f"{name}: %{{x:{measure.format}}}<extra></extra>",
            )
        )
    if reference is not None:
        figure.add_vline(x=reference, line={"color": NEUTRAL, "width": 1, "dash": "dot"})
    more = {} if ends is None else {"range": list(ends)}
    figure.update_layout(
        layout(
            height=90 + 44 * len(rows),
            legend=False,
            xaxis=axis(measure.title, tickformat=measure.tick, nticks=6, **more),
            yaxis=axis(
                "",
                type="category",
                categoryorder="array",
                categoryarray=names[::-1],
                ticks="",
                showgrid=False,
                range=[-0.6, len(names) - 0.4],
            ),
        )
    )
    return figure
