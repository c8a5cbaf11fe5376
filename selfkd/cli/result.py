"""What a run from Python takes and gives: settings of any form, and a `Result`."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar, overload

from selfkd.cli.command import Command, Options
from selfkd.config import Config, to_tree
from selfkd.experiments.run_folder import BEST, RunFolder
from selfkd.loading.choose import model_files
from selfkd.reporting.plain import confirmed_rows, headline, plain_rows, short_table
from selfkd.results import DeploySummary, Row, Summary, Verdict
from selfkd.text import one_line

if TYPE_CHECKING:
    import pandas as pd

    from selfkd.loading.model import LoadedModel

S = TypeVar("S", bound=Summary)
Given = str | Path | Mapping[str, Any] | Config | None
"""A config: a YAML file, a mapping like its content, or one that was loaded."""
Settings = Mapping[str, Any] | Sequence[str]
"""Values by dotted key, or `dotted.key=value` texts as after `--set`."""


class Table(Sequence[Row]):
    """Rows of plain values by the names of their columns.

    >>> table = Table([{"name": "generation 0", "test_accuracy": 0.9}])
    >>> table[0]["test_accuracy"], table.columns
    (0.9, ('name', 'test_accuracy'))
    >>> print(table)
    name          test_accuracy
    generation 0         0.9000
    """

    def __init__(self, rows: Sequence[Row]) -> None:
        self._rows = [dict(row) for row in rows]

    @property
    def columns(self) -> tuple[str, ...]:
        """Names of the columns, the same in all rows."""
        return tuple(self._rows[0]) if self._rows else ()

    def to_pandas(self) -> pd.DataFrame:
        """Return the rows as a data frame, indexed by their names.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError:
            raise ImportError(
                "pandas must be installed for a data frame: pip install pandas; the table itself "
                "is a sequence of mappings"
            ) from None
        frame = pandas.DataFrame(self._rows, columns=list(self.columns))
        return frame.set_index("name") if "name" in self.columns else frame

    @overload
    def __getitem__(self, place: int) -> Row: ...

    @overload
    def __getitem__(self, place: slice) -> list[Row]: ...

    def __getitem__(self, place: int | slice) -> Row | list[Row]:
        return self._rows[place]

    def __len__(self) -> int:
        return len(self._rows)

    def _cells(self) -> list[list[str]]:
        return [list(self.columns), *([*map(_shown, row.values())] for row in self._rows)]

    def __repr__(self) -> str:
        return _as_text(self._cells())

    def _repr_html_(self) -> str:
        return _as_html(self._cells())


@dataclass(frozen=True, eq=False, repr=False)
class Result(Generic[S]):
    """The result of a finished run."""

    folder: Path
    """Run folder."""
    summary: S
    """Summary, as in its `summary.json`."""

    @property
    def headline(self) -> str:
        """The verdict in one sentence; empty where nothing was confirmed."""
        return headline(self.summary)

    @property
    def verdict(self) -> Verdict | None:
        """The verdict with all its comparisons; None where nothing was confirmed."""
        found: Any = getattr(self.summary, "verdict", None)
        return found if isinstance(found, Verdict) else None

    @property
    def confirmation(self) -> Sequence[Any]:
        """Rows of the summary that were measured on fresh seeds."""
        return confirmed_rows(self.summary)

    @property
    def table(self) -> Table:
        """A row for each model, arm or size, with its metrics and intervals."""
        return Table(plain_rows(self.summary))

    @property
    def models(self) -> dict[str, Path]:
        """Files of the models by their names, that of the chosen one under `best`; of a deployment
        those to serve, such as `int8.onnx`."""
        if isinstance(self.summary, DeploySummary):
            files = {name: self.folder / file for name, file in self.summary.files.items()}
            return {name: path for name, path in files.items() if path.exists()}
        best = self.folder / BEST
        chosen = {"best": best} if best.exists() else {}
        return chosen | model_files(RunFolder(self.folder))

    def load(
        self,
        *,
        generation: int | None = None,
        ensemble: bool = False,
        make_model: Callable[[], Any] | None = None,
    ) -> LoadedModel:
        """Load the chosen model, or another; see `selfkd.load`.

        Args:
            generation: Number of the generation whose model is loaded.
            ensemble: Whether to load the ensemble of all generations, or of the teachers.
            make_model: Function that makes the network, for one that was trained by a function of
                yours.
        """
        from selfkd.loading.model import load  # torch: where a model is asked for

        return load(self.folder, generation=generation, ensemble=ensemble, make_model=make_model)

    def __repr__(self) -> str:
        before, after = self._lines()
        return "\n".join([*map(one_line, before), _as_text(short_table(self.summary)), *after])

    def _repr_html_(self) -> str:
        before, after = (
            "".join(f"<p>{escape(line)}</p>" for line in part) for part in self._lines()
        )
        return f"{before}{_as_html(short_table(self.summary))}{after}"

    def _lines(self) -> tuple[list[str], list[str]]:
        """Return what stands before and after the table."""
        best = getattr(self.summary, "best", None)
        chosen = (
            [] if best is None else [f"best on validation: generation {best}; .load() loads it"]
        )
        return [self.headline] * bool(self.headline), [*chosen, f"run folder: {self.folder}"]


def run_command(
    command: Command[S],
    *,
    config: Given,
    settings: Settings,
    flags: Mapping[str, Any],
    resume: str | Path | None,
    quiet: bool,
) -> Result[S]:
    """Run a command from Python.

    Args:
        command: Command to run.
        config: Config to start from.
        settings: Settings over it.
        flags: Values by dotted key over these; None leaves one out.
        resume: Run folder to continue.
        quiet: Whether the table and errors only are printed.

    Raises:
        ConfigError: A setting is not as it must be.
        RuntimeError: The run failed.
    """
    texts = _texts(settings)
    if config is None or isinstance(config, str | Path):
        file = config
    else:
        tree = to_tree(config) if isinstance(config, Config) else config
        file, texts = None, [*_texts(tree), *texts]
    folder, _, summary = command.run(
        Options(config=file, settings=texts, flags=flags, resume=resume, quiet=quiet)
    )
    return Result(folder.path, summary)


def _texts(settings: Settings) -> Sequence[str]:
    """Return settings as texts after `--set`.

    >>> _texts({"train.lr": 1e-05, "model": {"name": "selfkd_cnn"}})
    ['train.lr=1e-05', 'model={"name": "selfkd_cnn"}']
    """
    if isinstance(settings, Mapping):
        return [f"{key}={json.dumps(value, default=str)}" for key, value in settings.items()]
    return [settings] if isinstance(settings, str) else settings


def _as_text(cells: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            one_line(text).rjust(width) if place else one_line(text).ljust(width)
            for place, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )


def _as_html(cells: Sequence[Sequence[str]]) -> str:
    head, *rows = ([escape(text) for text in row] for row in cells)
    body = "".join(f"<tr><td>{'</td><td>'.join(row)}</td></tr>" for row in rows)
    return f"<table><tr><th>{'</th><th>'.join(head)}</th></tr>{body}</table>"


def _shown(value: Any) -> str:
    """Return a value in a cell.

    >>> _shown(0.91234), _shown(682), _shown(None)
    ('0.9123', '682', '')
    """
    if isinstance(value, float):
        return f"{value:,.0f}" if value.is_integer() and abs(value) > 1 else f"{value:.4f}"
    return "" if value is None else one_line(str(value))
