"""A table of texts."""

from __future__ import annotations

from dataclasses import dataclass

from selfkd.text import one_line


@dataclass(frozen=True)
class Table:
    """Texts in rows; the first column names the row."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    texts: bool = False
    """Whether the cells are words, which are aligned to the left."""
    rules: tuple[int, ...] = ()
    """Rows above which a terminal draws a rule."""

    def __post_init__(self) -> None:
        """Make each cell one line without control characters, as names and errors are foreign."""
        object.__setattr__(self, "head", tuple(map(one_line, self.head)))
        rows = tuple(tuple(map(one_line, row)) for row in self.rows)
        object.__setattr__(self, "rows", rows)

    def without_empty(self) -> Table:
        """Return the table without empty columns."""
        kept = [
            place
            for place in range(len(self.head))
            if place == 0 or any(row[place] for row in self.rows)
        ]
        return Table(
            tuple(self.head[place] for place in kept),
            tuple(tuple(row[place] for place in kept) for row in self.rows),
            self.note,
            self.texts,
            self.rules,
        )
