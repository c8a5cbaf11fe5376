"""The data that figures draw, and the classes of the page that colour them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from markupsafe import Markup

from selfkd.reporting.figures.svg import Drawing
from selfkd.text import one_line

COLOURS = 7
"""Number of colours of generations, after which they repeat with another dash."""


def colour(number: int) -> str:
    """Return the class of a generation's colour, the same in all figures; labels only is grey.

    >>> colour(0), colour(1), colour(8)
    ('c0', 'c1', 'c1 again')
    """
    if number <= 0:
        return "c0"
    return f"c{(number - 1) % COLOURS + 1}" + (" again" if number > COLOURS else "")


@dataclass(frozen=True)
class Measure:
    """A metric on an axis: its title, and whether it is a fraction, shown in percent."""

    title: str
    percent: bool = True
    larger_is_better: bool = True
    unit: str = ""
    """Unit of its values, such as nats."""

    @property
    def axis(self) -> str:
        """Title of an axis, with the unit.

        >>> Measure("NLL on test", unit="nats").axis, Measure("accuracy on test").axis
        ('NLL on test, nats', 'accuracy on test')
        """
        return f"{self.title}, {self.unit}" if self.unit else self.title

    def text(self, value: float) -> str:
        """Return a value as a text."""
        return f"{value:.2%}" if self.percent else f"{value:.4g}"

    def change(self, value: float) -> str:
        """Return a difference as a text: of fractions in percent."""
        return f"{value:+.2%}" if self.percent else self.gain(value)

    def gain(self, value: float) -> str:
        """Return a difference as a text: of fractions in points."""
        return f"{100 * value:+.2f}" if self.percent else f"{value:+.3g}"


@dataclass(frozen=True)
class Bar:
    """A value with the ends of its interval, if it has them."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Gain:
    """A difference to generation 0: its mean, that of each seed, and whether it is established."""

    name: str
    bar: Bar
    seeds: Mapping[int, float] = field(default_factory=dict)
    """Difference of each seed."""
    number: int = 0
    """Number of the generation."""
    established: bool = False
    """Whether a test that is corrected for all comparisons says better, or worse."""


@dataclass(frozen=True)
class Line:
    """A named curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    number: int = 0
    """Number of the generation, for the colour."""


@dataclass(frozen=True)
class Level:
    """A named value with its interval, and the values that it is the mean of."""

    name: str
    bar: Bar
    points: Sequence[float] = ()
    number: int = 1
    """Number of the colour."""


@dataclass(frozen=True)
class Setting:
    """A trial over T and alpha."""

    temperature: float
    alpha: float
    value: float
    """Metric on validation, less the mean of its generation."""
    label: str
    """Number of its generation, or of the trial where there is one search."""
    tip: str = ""
    chosen: bool = False


@dataclass(frozen=True)
class Surface:
    """A response over T (columns) and alpha (rows)."""

    temperatures: Sequence[float]
    alphas: Sequence[float]
    values: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Figure:
    """Drawings side by side, with one legend: names with the classes of their colours."""

    parts: tuple[Drawing, ...]
    legend: tuple[tuple[str, str], ...] = ()

    def markup(self) -> Markup:
        """Return the figure as HTML."""
        entry = Markup('<span><i class="{}"></i>{}</span>')
        entries = Markup("").join(
            entry.format(style, one_line(name)) for name, style in self.legend
        )
        legend = Markup('<div class="legend">{}</div>').format(entries) if entries else ""
        drawings = Markup("").join(part.markup() for part in self.parts)
        return Markup('<div class="drawing">{}<div class="parts">{}</div></div>').format(
            legend, drawings
        )
