"""Graphs that `torch.compile` makes of a student, counted: each costs seconds to minutes."""

from __future__ import annotations

from selfkd.results import Row

MOST_GRAPHS = 8
"""Graphs of one training above which it is warned of: the student in train and eval mode, each also
for a last batch of another size, and as many once more."""


class Graphs:
    """Graphs that are made from now on in this process.

    Args:
        compiled: Whether the student runs through `torch.compile`; else nothing is counted.
    """

    def __init__(self, compiled: bool) -> None:
        self._compiled, self._warned = compiled, False
        self._before = _made() if compiled else 0

    def add_to(self, row: Row) -> None:
        """Add their number to the row of an epoch as `compiled_graphs`, and a warning of too many.

        >>> row = {}
        >>> Graphs(compiled=False).add_to(row)
        >>> row
        {}
        """
        if not self._compiled:
            return
        count = _made() - self._before
        row["compiled_graphs"] = count
        if count > MOST_GRAPHS and not self._warned:
            self._warned = True
            said = f"{row['note']}; " if row.get("note") else ""
            row["note"] = (
                f"{said}torch.compile has made {count} graphs of one training, each for other "
                "shapes or settings, which may cost more time than they save: train.compile=false, "
                "or TORCH_LOGS=recompiles says why"
            )


def _made() -> int:
    import torch._dynamo.utils  # two seconds, which only a compiled training spends

    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])
