"""Drawings in SVG that fit any width: x in percent, y in pixels, colours by classes of the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from selfkd.text import one_line

FAR = 1e300
"""Numbers beyond it are not drawn: their differences overflow."""
Ticks = tuple[tuple[float, str], ...]
Point = tuple[float, float]
SYMBOLS = {
    "square": "M-4.5-4.5h9v9h-9z",
    "diamond": "M0-6 6 0 0 6-6 0z",
    "up": "M0-5 5 4-5 4z",
    "down": "M0 5-5-4 5-4z",
}


def finite(values: Iterable[float | None]) -> list[float]:
    """Return the values that can be drawn.

    >>> finite([1.0, None, float("nan"), 1e308])
    [1.0]
    """
    return [value for value in values if value is not None and abs(value) < FAR]


def ends_of(values: Iterable[float | None]) -> tuple[float, float]:
    """Return the least and the largest value that can be drawn; 0 and 1 where there is none."""
    known = finite(values) or [0.0, 1.0]
    return min(known), max(known)


@dataclass(frozen=True)
class Axis:
    """A range of values with its ticks and title."""

    low: float
    high: float
    ticks: Ticks = ()
    title: str = ""
    logarithmic: bool = False

    def at(self, value: float) -> float:
        """Return the place of a value, 0 at the low end and 1 at the high one; never far outside.

        >>> Axis(0, 4).at(1), Axis(1, 100, logarithmic=True).at(10), Axis(0, 1).at(9)
        (0.25, 0.5, 1.5)
        """
        ends = self.low, self.high
        if self.logarithmic:
            value = max(value, 1e-300)
            low, high, value = (math.log(each) for each in (*ends, value))
        else:
            low, high = ends
        return min(max((value - low) / (high - low), -0.5), 1.5)


def linear_axis(
    ends: tuple[float, float], title: str = "", *, percent: bool = False, sign: bool = False
) -> Axis:
    """Return a linear axis with about five round ticks.

    Args:
        ends: Least and largest value.
        title: Title.
        percent: Whether values are fractions, shown in percent.
        sign: Whether ticks above 0 have a plus.

    >>> linear_axis((0.0, 1.0), percent=True).ticks[:2]
    ((0.0, '0%'), (0.2, '20%'))
    """
    low, high = ends if ends[1] > ends[0] else (ends[0] - 0.5, ends[0] + 0.5)
    if not high > low:  # too large for half a unit to be seen
        low, high = sorted((0.0, 2 * low))
    power = 10.0 ** math.floor(math.log10((high - low) / 5))
    step = next(power * each for each in (1, 2, 5, 10) if (high - low) / (power * each) <= 6)
    shown = step * (100 if percent else 1)
    digits = max(0, -math.floor(math.log10(shown) + 1e-9))
    form = f"{'+' if sign else ''}.{digits}f" if digits < 5 and abs(high) < 1e6 else ".3g"
    ticks = []
    for number in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1):
        value = round(number * step, 12) if abs(number * step) < 1e6 else number * step
        text = f"{value * (100 if percent else 1):{form}}" if value else "0"
        ticks.append((value, text.replace("-", "−") + "%" * percent))
    return Axis(low, high, tuple(ticks), title)


def log_axis(ends: tuple[float, float], title: str = "") -> Axis:
    """Return a logarithmic axis with ticks at 1, 2 and 5, or at powers of ten of a wide range.

    >>> [text for _, text in log_axis((1.0, 20.0)).ticks]
    ['1', '2', '5', '10', '20']
    """
    low, high = max(ends[0], 1e-12), min(max(ends[1], 1e-12), 1e15)
    low, high = (low, high) if high > low else (low / 1.5, low * 1.5)
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    steps = (1, 2, 5) if high / low < 500 else (1,)
    values = [step * 10.0**power for power in decades for step in steps]
    kept = [value for value in values if low * 0.999 <= value <= high * 1.001]
    return Axis(low, high, tuple((value, short(value)) for value in kept), title, True)


def short(value: float) -> str:
    """Return a round number in few signs.

    >>> short(0.5), short(20), short(5e6)
    ('0.5', '20', '5M')
    """
    for unit, name in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= unit:
            return f"{value / unit:g}{name}"
    return f"{value:g}"


def category_axis(names: Sequence[str], title: str = "") -> Axis:
    """Return an axis with a name at 0, 1, 2, …"""
    return Axis(-0.5, max(len(names), 1) - 0.5, tuple(enumerate(names)), title)


@dataclass
class Drawing:
    """A drawing over two axes.

    Args:
        x: Axis along the width.
        y: Axis along the height, upwards.
        height: Height in pixels.
        title: Accessible name.
        left: Room for the ticks of y in pixels.
        bottom: Room for the ticks and the title of x in pixels.
        grid: Whether lines mark the ticks of y.
    """

    x: Axis
    y: Axis
    height: int
    title: str
    left: int = 46
    bottom: int = 40
    grid: bool = True
    share: int = 1
    """Share of the width, beside others."""
    _under: list[Markup] = field(default_factory=list)
    _lines: list[Markup] = field(default_factory=list)
    _over: list[Markup] = field(default_factory=list)

    def line(self, points: Sequence[Point], style: str = "line") -> None:
        """Draw a line through the points that can be drawn."""
        places = [
            f"{1000 * self.x.at(x):.1f},{self._y(y)}" for x, y in points if len(finite((x, y))) == 2
        ]
        if places:
            text = Markup('<polyline class="{}" points="{}"/>')
            self._lines.append(text.format(style, " ".join(places)))

    def dot(self, x: float, y: float, style: str, tip: str = "", *, r: float = 4) -> None:
        """Draw a disc, with words that are shown where it is pointed at."""
        if len(finite((x, y))) == 2:
            text = Markup('<circle class="{}" cx="{}" cy="{}" r="{:.1f}">{}</circle>')
            self._over.append(text.format(style, self._x(x), self._y(y), r, _tip(tip)))

    def symbol(self, name: str, x: float, y: float, style: str, tip: str = "") -> None:
        """Draw one of `SYMBOLS`."""
        self._placed(x, Markup('<path transform="translate(0 {})" d="{}" class="{}">{}</path>')
                     .format(self._y(y), SYMBOLS[name], style, _tip(tip)))  # fmt: skip

    def whisker(self, x: float, low: float, high: float, style: str = "whisker") -> None:
        """Draw an interval of y."""
        if len(finite((x, low, high))) < 3:
            return
        bottom, top = self._y(low), self._y(high)
        path = Markup('<path class="{0}" d="M0 {1}V{2}M-5 {1}H5M-5 {2}H5"/>')
        self._placed(x, path.format(style, bottom, top))

    def across(
        self, y: float, low: float, high: float, style: str = "whisker", *, caps: bool = True
    ) -> None:
        """Draw an interval of x."""
        if len(finite((y, low, high))) < 3:
            return
        text = Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        here = float(self._y(y))
        ends = self._x(low), self._x(high)
        self._over.append(text.format(style, *ends, here, here))
        for end in ends if caps else ():
            self._over.append(text.format(style, end, end, here - 5, here + 5))

    def rule(self, *, x: float | None = None, y: float | None = None, style: str = "rule") -> None:
        """Draw a line across the drawing, at an x or at a y."""
        text = Markup('<line class="{}" x1="{}" x2="{}" y1="{}" y2="{}"/>')
        if x is not None:
            self._under.append(text.format(style, self._x(x), self._x(x), 0, self.height))
        if y is not None:
            self._under.append(text.format(style, 0, "100%", self._y(y), self._y(y)))

    def cell(
        self, x: tuple[float, float], y: tuple[float, float], style: str, tip: str = ""
    ) -> None:
        """Draw a rectangle, such as a bar or a cell of a surface."""
        low, high = sorted(self.x.at(each) for each in x)
        top, bottom = sorted(float(self._y(each)) for each in y)
        text = Markup('<rect {} x="{:.2f}%" y="{:.1f}" width="{:.2f}%" height="{:.1f}"{}')
        place = 100 * low, top, 100 * (high - low), bottom - top
        end = Markup(">{}</rect>").format(_tip(tip)) if tip else Markup("/>")
        self._under.append(text.format(Markup(style), *place, end))  # noqa: S704

    def text(
        self, x: float, y: float, text: str, style: str = "", *, shift: Point = (0, 0)
    ) -> None:
        """Write a text at a place, moved by pixels to the right and downwards."""
        if len(finite((x, y))) == 2:
            line = Markup('<text class="{}" x="{}" y="{}" dx="{:g}" dy="{:g}">{}</text>')
            here = line.format(style, self._x(x), self._y(y), *shift, one_line(text))
            self._over.append(here)

    def markup(self) -> Markup:
        """Return the element."""
        fluid = Markup(
            '<svg class="fluid" width="100%" height="{0}" viewBox="0 0 1000 {0}" '
            'preserveAspectRatio="none">{1}</svg>'
        )
        lines = fluid.format(self.height, _joined(self._lines)) if self._lines else ""
        top = 30 if self.y.title else 12
        return Markup(
            '<svg class="plot" role="img" style="height:{}px;padding:{}px 14px {}px {}px;flex:{}">'
            "<title>{}</title>{}{}{}{}</svg>"
        ).format(
            *(self.height + top + self.bottom, top, self.bottom, self.left, self.share),
            *(one_line(self.title), self._axes(), _joined(self._under), lines, _joined(self._over)),
        )

    # --- parts ---

    def _axes(self) -> Markup:
        tick = Markup('<text class="tick {}" x="{}" y="{}" dx="{}" dy="{}">{}</text>')
        grid = Markup('<line class="grid" x1="0" x2="100%" y1="{0}" y2="{0}"/>')
        found = []
        for value, text in self.y.ticks:
            here = self._y(value)
            found.append(grid.format(here) if self.grid else Markup(""))
            found.append(tick.format("end", 0, here, -8, 4, text))
        for value, text in self.x.ticks:
            for place, line in enumerate(wrapped(text, 12)):
                below = self.height + 18 + 13 * place
                found.append(tick.format("middle", self._x(value), below, 0, 0, line))
        base = Markup('<line class="axis" x1="0" x2="100%" y1="{0}" y2="{0}"/>')
        found.append(base.format(self.height))
        if self.y.title:
            found.append(tick.format("start", 0, -14, -self.left, 0, one_line(self.y.title)))
        if self.x.title:
            found.append(
                tick.format("middle", "50%", self.height + 35, 0, 0, one_line(self.x.title))
            )
        return _joined(found)

    def _placed(self, x: float, what: Markup) -> None:
        if finite([x]):
            self._over.append(Markup('<svg class="at" x="{}">{}</svg>').format(self._x(x), what))

    def _x(self, value: float) -> str:
        return f"{100 * self.x.at(value):.2f}%"

    def _y(self, value: float) -> str:
        return f"{self.height * (1 - self.y.at(value)):.1f}"


def wrapped(text: str, width: int) -> list[str]:
    """Return a text on lines of about that width.

    >>> wrapped("permuted teacher logits", 12)
    ['permuted', 'teacher', 'logits']
    """
    lines: list[str] = []
    for word in one_line(text).split():
        if lines and len(lines[-1]) + len(word) < width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines


def _joined(parts: Sequence[Markup]) -> Markup:
    return Markup("").join(parts)


def _tip(text: str) -> Markup:
    return Markup("<title>{}</title>").format(one_line(text)) if text else Markup("")
