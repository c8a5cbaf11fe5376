"""Figures of classes beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from selfkd.reporting.figures.style import Figure
from selfkd.reporting.figures.svg import Axis, Drawing, finite

CELL, SMALL_CELL = 32, 18
"""Height of a row in pixels, of few classes and of more."""
MOST_NUMBERS, LEAST_SHOWN = 12, 0.095
WIDEST, NARROW = 14, 5  # characters of a name beside a row, and below a column


def class_shares(names: Sequence[str], shares: Sequence[Sequence[float]], *, title: str) -> Figure:
    """Draw a share of each class (row) and other class (column) as a cell, darker where it is more.

    Args:
        names: Names of the classes.
        shares: Share of each other class, a row a class, in [0, 1].
        title: Accessible name.
    """
    count, few = len(names), len(names) <= MOST_NUMBERS
    labelled = few or max(map(len, names)) <= 2
    columns = tuple((n, _cut(name, NARROW)) for n, name in enumerate(names) if labelled)
    rows = tuple((-place, _cut(name, WIDEST)) for place, name in enumerate(names))
    drawing = Drawing(
        Axis(-0.5, count - 0.5, columns, f"wrong class{'' if labelled else ', in the same order'}"),
        Axis(-count + 0.5, 0.5, rows, "class of the items"),
        (CELL if few else SMALL_CELL) * count,
        title,
        left=22 + 7 * max(len(name) for _, name in rows),
        grid=False,
    )
    for row, values in enumerate(shares):
        for column, share in enumerate(values):
            if row == column or not finite([share]) or share <= 0:
                continue
            style = f'class="heat" fill-opacity="{share**0.5:.3f}"'
            ends = (column - 0.48, column + 0.48), (-row - 0.48, -row + 0.48)
            drawing.cell(*ends, style, f"{names[row]} → {names[column]}: {share:.1%}")
            if few and share >= LEAST_SHOWN:
                drawing.text(column, -row, f"{100 * share:.0f}", "value middle", shift=(0, 4))
    return Figure((drawing,))


def _cut(name: str, most: int) -> str:
    """Return the beginning of a name.

    >>> _cut("automobile", 5), _cut("ship", 5)
    ('auto…', 'ship')
    """
    return name if len(name) <= most else f"{name[: most - 1]}…"
