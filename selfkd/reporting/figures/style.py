"""The style of figures and the data they draw: colours for all eyes, on light, dark and paper."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
NEUTRAL = "#7a828e"
"""Grey that is visible on white and on near-black."""
ACCENT = "#1f77c4"
# after Okabe and Ito, Color Universal Design, 2008, https://jfly.uni-koeln.de/color/ ; the light
# ones a little darker, to be seen on white
PALETTE = ("#1f77c4", "#d98200", "#009e73", "#c2609a", "#d55e00", "#3a9fd6", "#8a6fd1")
SCALE = "Cividis"
"""Nuñez et al., Optimizing colormaps with consideration for color vision deficiency, 2018."""


def generation_colour(number: int) -> str:
    """Return the colour of a generation, the same in all figures; labels only is grey."""
    return NEUTRAL if number == 0 else PALETTE[(number - 1) % len(PALETTE)]


def generation_dash(number: int) -> str:
    """Return the dash of a generation's line, which differs where colours repeat."""
    return ("solid", "dash", "dot", "dashdot")[max(number - 1, 0) // len(PALETTE) % 4]


def literal(text: str) -> str:
    """Return a text that plotly shows literally: it takes some tags and entities for markup.

    >>> literal("<b>")
    '&lt;b&gt;'
    """
    return html.escape(text, quote=False)


def layout(*, height: int, legend: bool = True, **more: Any) -> dict[str, Any]:
    """Return the layout of all figures; axes are made by `axis`."""
    return {
        "template": "none",
        "height": height,
        "margin": {"l": 56, "r": 12, "t": 8, "b": 44},
        "font": {"family": FONT, "size": 12, "color": NEUTRAL},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "showlegend": legend,
        "legend": {"orientation": "h", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"},
        "hovermode": "closest",
        "dragmode": False,
        **more,
    }


def axis(title: str, **more: Any) -> dict[str, Any]:
    """Return an axis with thin lines, and without zoom, which would catch a scrolling finger."""
    return {
        "title": {"text": title, "standoff": 8},
        "gridcolor": "rgba(122,130,142,0.22)",
        "linecolor": "rgba(122,130,142,0.6)",
        "zeroline": False,
        "showline": True,
        "ticks": "outside",
        "tickcolor": "rgba(122,130,142,0.6)",
        "ticklen": 4,
        "fixedrange": True,
        "automargin": True,
        **more,
    }


@dataclass(frozen=True)
class Measure:
    """A metric on an axis: its title, and whether it is a fraction, shown in percent."""

    title: str
    percent: bool = True
    larger_is_better: bool = True

    @property
    def format(self) -> str:
        """Format of a value, for D3."""
        return ".2%" if self.percent else ".4g"

    @property
    def tick(self) -> str:
        """Format of a tick, for D3."""
        return "~%" if self.percent else "~g"


@dataclass(frozen=True)
class Bar:
    """A value with the ends of its interval, if it has them."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Step:
    """A generation in the figure of accuracies."""

    number: int
    trials: Sequence[tuple[int, float]] = ()
    """Number and validation metric of each trial."""
    chosen: tuple[int, float] | None = None
    """Number and validation metric of the chosen trial."""
    test: float | None = None
    confirmed: Bar | None = None


@dataclass(frozen=True)
class Line:
    """A named curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    number: int = 0
    """Number of the generation, for colour and dash."""


@dataclass(frozen=True)
class Level:
    """A named value with its interval, and the values that it is the mean of."""

    name: str
    bar: Bar
    points: Sequence[float] = ()
    colour: str = ACCENT


@dataclass(frozen=True)
class Surface:
    """A response over T (columns) and alpha (rows)."""

    temperatures: Sequence[float]
    alphas: Sequence[float]
    values: Sequence[Sequence[float]]


def error_bar(bar: Bar, *, ends: tuple[float, float] | None = None) -> dict[str, Any]:
    """Return plotly's error bar of an interval, cut at the ends of a frame if they are given."""
    if bar.low is None or bar.high is None:
        return {"visible": False}
    low, high = (
        (bar.low, bar.high) if ends is None else (max(bar.low, ends[0]), min(bar.high, ends[1]))
    )
    return {
        "type": "data",
        "symmetric": False,
        "array": [max(high - bar.value, 0.0)],
        "arrayminus": [max(bar.value - low, 0.0)],
        "thickness": 1.5,
        "width": 5,
    }


def finite(values: Sequence[float | None]) -> list[float]:
    """Return the finite values."""
    return [value for value in values if value is not None and math.isfinite(value)]


def ends_of(values: Sequence[float]) -> tuple[float, float]:
    """Return the least and the largest finite value; 0 and 1 where there is none."""
    known = finite(values) or [0.0, 1.0]
    return min(known), max(known)


def shown(value: float, measure: Measure) -> str:
    """Return a value of a measure as a text."""
    return f"{value:.2%}" if measure.percent else f"{value:.4g}"


def wrapped(text: str, width: int) -> str:
    """Return a literal text on several lines of about that width, as plotly breaks them."""
    lines: list[str] = []
    for word in text.split():
        if lines and len(lines[-1]) + len(word) < width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "<br>".join(literal(line) for line in lines)
