"""`python -m selfkd.report`: one run as a page and a table, or several side by side."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from selfkd.cli.terminal import make_console, print_table
from selfkd.errors import ConfigError
from selfkd.reporting.read import REPORT, Run, read_run
from selfkd.reporting.tables import Table
from selfkd.storage.files import save_text
from selfkd.storage.remote import as_path

FAILED, USAGE = 1, 2
COMPARISON = "comparison.html"


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m selfkd.report",
        description="Write the report of a run into its folder, or compare several runs.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument(
        "--format",
        choices=("html", "table", "csv", "json"),
        help="format of the output (default: html and table)",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help=f"file to write (default: RUN/report.html, or {COMPARISON} for several runs; tables, "
        "csv and json are printed)",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    output = Path(arguments.output).expanduser() if arguments.output else None
    try:
        _report(_read(arguments.runs), arguments.format, output)
    except ValueError as error:
        return _fault(str(error), USAGE)
    except OSError as error:
        return _fault(f"{error.filename or output}: {error.strerror}; choose an --output", FAILED)
    return 0


def _read(names: Sequence[str]) -> list[Run]:
    """Read runs, each once; those of the same name are called by their paths."""
    paths = list(dict.fromkeys(as_path(name).expanduser().absolute() for name in names))
    counts = Counter(path.name for path in paths)
    runs = [read_run(path) for path in paths]
    alone = [run for run in runs if run.capacity_summary or run.study_summary]
    if alone and len(runs) > 1:
        raise ConfigError(
            f"RUN of selfkd.{alone[0].command} stands alone, got {alone[0].path} beside others"
        )
    return [replace(run, label=str(run.path)) if counts[run.path.name] > 1 else run for run in runs]


def _report(runs: Sequence[Run], wanted: str | None, output: Path | None) -> None:
    if wanted in ("csv", "json"):
        _put((_csv if wanted == "csv" else _json)(runs), output)
    else:
        _show_all(runs, wanted, output)
    for problem in [problem for run in runs for problem in run.problems]:
        print(f"warning: {problem}", file=sys.stderr)  # noqa: T201


def _show_all(runs: Sequence[Run], wanted: str | None, output: Path | None) -> None:
    """Print the table and write the page, or the one of them that is wanted."""
    console = make_console()
    if wanted != "html":
        if wanted == "table" and output is not None:
            text = io.StringIO()
            _print(Console(file=text, width=console.width, markup=False, highlight=False), runs)
            save_text(output, text.getvalue())
        else:
            _print(console, runs)
    if wanted != "table":
        written = _write(runs, output)
        console.print(f"report:  {written}", soft_wrap=True)


def _write(runs: Sequence[Run], output: Path | None) -> Path:
    from selfkd.reporting.comparison_page import comparison_page  # plotly: only where it is needed
    from selfkd.reporting.page import render, run_page

    page = run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)
    path = output or (runs[0].path / REPORT if len(runs) == 1 else Path(COMPARISON))
    save_text(path, render(page), patience=0)
    return path


def _print(console: Console, runs: Sequence[Run]) -> None:
    from selfkd.reporting import comparison_page as comparison
    from selfkd.reporting import tables, words

    if len(runs) == 1:
        run = runs[0]
        console.print(f"{run.name}: {words.status(run)}", soft_wrap=True)
        _show(console, tables.results_table(run))
        console.print("\n".join(words.headlines(run)), soft_wrap=True)
        return
    _show(console, comparison.runs_table(runs))
    repeated = comparison.repeats(runs)
    if repeated:
        _show(console, comparison.repeats_table(repeated))
    console.print("\n".join(comparison.verdicts(runs)), soft_wrap=True)
    for run in runs:
        if run.missing is not None:
            console.print(f"{run.name} is {words.status(run)}", soft_wrap=True)


def _show(console: Console, table: Table) -> None:
    print_table(console, table)
    if table.note:
        console.print(table.note, soft_wrap=True)


def _csv(runs: Sequence[Run]) -> str:
    from selfkd.reporting.comparison_page import FIELDS, records

    text = io.StringIO()
    writer = csv.DictWriter(text, FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(_finite(row) for run in runs for row in records(run))
    return text.getvalue()


def _json(runs: Sequence[Run]) -> str:
    from selfkd.reporting.comparison_page import comparisons, records, repeats

    tree = {
        "runs": [
            {
                "name": run.name,
                "path": str(run.path),
                "command": run.command,
                "finished": run.finished,
                "missing": run.missing,
                "problems": list(run.problems),
                "rows": records(run),
            }
            for run in runs
        ],
        "comparisons": [{**asdict(c), "verdict": c.verdict} for c in comparisons(runs)],
        "across": [asdict(row) for row in repeats(runs)],
    }
    return json.dumps(_finite(tree), indent=1, allow_nan=False) + "\n"


def _finite(value: Any) -> Any:
    """Return a tree with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: _finite(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _put(text: str, output: Path | None) -> None:
    if output is None:
        sys.stdout.write(text)
    else:
        save_text(output, text)


def _fault(message: str, code: int) -> int:
    print(f"error: {message}", file=sys.stderr)  # noqa: T201
    return code


if __name__ == "__main__":
    raise SystemExit(main())
