"""The terminal: its console, and tables on it."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, TextIO, cast

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable
from rich.text import Text

from selfkd.cli.output import SafeStream
from selfkd.reporting.tables import Table
from selfkd.text import one_line, visible

LOG_WIDTH = 100_000  # where there is no terminal: tables have all of their columns
MOST_NAMES = 20  # of hidden columns


class _Console(Console):
    """A console whose texts control no terminal, whoever has written them."""

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str(visible(text), **options)


def make_console(file: TextIO | None = None) -> Console:
    """Return the console of a command's own output.

    Args:
        file: File to print to; stdout when not given.
    """
    if file is None and sys.stdout is not None and not isinstance(sys.stdout, SafeStream):
        # called from Python
        file = cast(TextIO, SafeStream(sys.stdout))
    plain: dict[str, Any] = {"highlight": False, "markup": False, "emoji": False}
    console = _Console(file=file, **plain)
    if console.is_jupyter:  # lines of text: each would be a block of HTML of its own
        console = _Console(file=file, force_jupyter=False, force_terminal=False, **plain)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def print_lines(console: Console, lines: Sequence[str]) -> None:
    """Print texts, each on a line of its own, whatever is in it."""
    console.print("\n".join(map(one_line, lines)), soft_wrap=True)


def print_sentences(console: Console, lines: Sequence[str]) -> None:
    """Print sentences: a terminal breaks them between words, a log has one a line."""
    console.print("\n".join(map(one_line, lines)), soft_wrap=not console.is_terminal)


def print_table(console: Console, table: Table | RichTable) -> None:
    """Print a table, without its last columns where the terminal is too narrow, which is said."""
    drawn = table if isinstance(table, RichTable) else _draw(table)
    columns = drawn.columns
    last_first = [n for n in range(len(columns))[:0:-1] if columns[n].header != "test acc"]
    last_first = last_first[: max(len(columns) - 2, 0)]
    wide = console.options.update(max_width=console.width + 1)

    def fits(count: int) -> bool:
        """Say whether the table fits without as many columns, and leave them out."""
        hidden = set(last_first[:count])
        drawn.columns = [column for n, column in enumerate(columns) if n not in hidden]
        return Measurement.get(console, wide, drawn).maximum <= console.width

    # a column takes a character at least, so that no more than the width has need be measured
    least = min(max(len(columns) - console.width, 0), len(last_first))
    count = bisect_left(range(len(last_first)), x=True, lo=least, key=fits)
    fits(count)
    console.print(drawn)
    names = [str(columns[n].header) for n in reversed(last_first[:count]) if columns[n].header]
    if count:
        more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
        shown = ", ".join(names[:MOST_NAMES])
        console.print(f"columns hidden (terminal too narrow): {shown}{more}")


def _draw(table: Table) -> RichTable:
    """Return a table whose first column names the row."""
    drawn = RichTable(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for place, title in enumerate(table.head):
        drawn.add_column(title, justify="right" if place else "left", no_wrap=True)
    for number, row in enumerate(table.rows):
        if number in table.rules:
            drawn.add_section()
        drawn.add_row(*row)
    return drawn
