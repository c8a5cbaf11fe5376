"""The terminal: its console, and tables on it."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table as RichTable

from selfkd.reporting.tables import Table

LOG_WIDTH = 110  # where there is no terminal


def make_console() -> Console:
    """Return the console of a command's own output."""
    console = Console(highlight=False, markup=False)
    if not console.is_terminal:
        console.width = LOG_WIDTH
    return console


def print_table(console: Console, table: Table | RichTable) -> None:
    """Print a table, without its last columns where the terminal is too narrow, which is said."""
    drawn = table if isinstance(table, RichTable) else _draw(table)
    wide = console.options.update(max_width=1000)
    hidden: list[str] = []
    while Measurement.get(console, wide, drawn).maximum > console.width and len(drawn.columns) > 2:
        column = next(c for c in drawn.columns[:0:-1] if c.header != "test acc")
        drawn.columns.remove(column)
        hidden.insert(0, str(column.header))
    console.print(drawn)
    if hidden:
        names = ", ".join(filter(None, hidden))
        console.print(f"columns hidden (terminal too narrow): {names}")


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
