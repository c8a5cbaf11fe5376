"""Figures of classes beside each other."""

from __future__ import annotations

from collections.abc import Sequence

from selfkd.reporting.figures.style import Figure
from selfkd.reporting.figures.svg import Axis, Drawing, finite

CELL = 32
"""Height of a row in pixels."""
MOST_NUMBERS, LEAST_SHOWN = 12, 0.095
WIDEST = 14  # characters of a name beside a row


def class_shares(names: Sequence[str], shares: Sequence[Sequence[float]], *, title: str) -> Figure:
    """Draw a share of each class (row) and other class (column) as a cell, darker where it is more.

    Args:
        names: Names of the classes.
        shares: Share of each other class, a row a class, in [0, 1].
        title: Accessible name.
    """
    count, height = len(names), CELL if len(names) <= MOST_NUMBERS else 18
    columns = tuple((place, _cut(name, 6)) for place, name in enumerate(names))
    rows = tuple((-place, _cut(name, WIDEST)) for place, name in enumerate(names))
    drawing = Drawing(
        Axis(-0.5, count - 0.5, columns, "wrong class"),
        Axis(-count + 0.5, 0.5, rows, "class of the items"),
        height * count,
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
            if count <= MOST_NUMBERS and share >= LEAST_SHOWN:
                drawing.text(column, -row, f"{100 * share:.0f}", "value middle", shift=(0, 4))
    return Figure((drawing,))


def _cut(name: str, most: int) -> str:
    """Return the beginning of a name.

    >>> _cut("automobile", 6), _cut("ship", 6)
    ('autom…', 'ship')
    """
    return name if len(name) <= most else f"{name[: most - 1]}…"
