"""How figures look: colours that all eyes tell apart, on light and dark and on paper."""

from __future__ import annotations

import html
from typing import Any

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', sans-serif"
NEUTRAL = "#7a828e"
"""Is seen on white and on near-black."""
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
    """Return the dash of a generation's line: tells those apart whose colours come again."""
    return ("solid", "dash", "dot", "dashdot")[max(number - 1, 0) // len(PALETTE) % 4]


def literal(text: str) -> str:
    """Return a text that plotly shows to the letter: it takes some tags and entities for markup.

    >>> literal("<b>")
    '&lt;b&gt;'
    """
    return html.escape(text, quote=False)


def layout(*, height: int, legend: bool = True, **more: Any) -> dict[str, Any]:
    """Return the layout that all figures have; axes as `axis` gives them."""
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
    """Return an axis: thin lines, no zoom, which would catch a finger that scrolls."""
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
