"""`python -m selfkd.report`: one run as a page and a table, or several side by side."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from selfkd.cli.output import print_data, print_error, safe_output
from selfkd.cli.terminal import make_console, print_lines, print_table
from selfkd.errors import ConfigError
from selfkd.reporting.read import REPORT, Run, read_run
from selfkd.reporting.tables import Table
from selfkd.storage.files import save_text
from selfkd.storage.remote import as_path
from selfkd.text import one_line

FAILED, USAGE = 1, 2
COMPARISON = "comparison.html"
_FORMULA = ("=", "+", "-", "@", "\uff1d", "\uff0b", "\uff0d", "\uff20")
"""Signs with which a formula begins, and their full-width forms."""


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


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    output = None
    try:
        output = as_path(arguments.output).expanduser() if arguments.output else None
        return _report(_read(arguments.runs), arguments.format, output)
    except ValueError as error:
        return _fault(str(error), USAGE)
    except OSError as error:
        return _fault(f"{error.filename or output}: {error.strerror}; choose an --output", FAILED)


def _read(names: Sequence[str]) -> list[Run]:
    """Read runs, each once; those of the same name are called by their paths."""
    paths = list(dict.fromkeys(as_path(name).expanduser().absolute() for name in names))
    counts = Counter(path.name for path in paths)
    runs = [read_run(path) for path in paths]
    alone = [
        run for run in runs if run.capacity_summary or run.study_summary or run.command == "deploy"
    ]
    if alone and len(runs) > 1:
        raise ConfigError(
            f"RUN of selfkd.{alone[0].command} stands alone, got {alone[0].path} beside others"
        )
    return [replace(run, label=str(run.path)) if counts[run.path.name] > 1 else run for run in runs]


def _report(runs: Sequence[Run], wanted: str | None, output: Path | None) -> int:
    code = 0
    if wanted in ("csv", "json"):
        code = _put((_csv if wanted == "csv" else _json)(runs), output)
    else:
        _show_all(runs, wanted, output)
    for problem in [problem for run in runs for problem in run.problems]:
        print_error(problem, kind="warning")
    return code


def _show_all(runs: Sequence[Run], wanted: str | None, output: Path | None) -> None:
    """Print the table and write the page, or the one of them that is wanted."""
    console = make_console()
    if wanted != "html":
        if wanted == "table" and output is not None:
            text = io.StringIO()
            _print(make_console(text), runs)
            save_text(output, text.getvalue())
        else:
            _print(console, runs)
    if wanted != "table":
        written = _write(runs, output)
        print_lines(console, [f"report:  {written}"])


def _write(runs: Sequence[Run], output: Path | None) -> Path:
    from selfkd.reporting.comparison_page import comparison_page  # jinja2: only where it is needed
    from selfkd.reporting.page import render, run_page

    page = run_page(runs[0]) if len(runs) == 1 else comparison_page(runs)
    path = output or (runs[0].path / REPORT if len(runs) == 1 else Path(COMPARISON))
    save_text(path, render(page), patience=0)
    return path


def _print(console: Console, runs: Sequence[Run]) -> None:
    from selfkd.reporting import comparison_page as comparison
    from selfkd.reporting import tables, words
    from selfkd.reporting.deploy_table import deploy_table

    if len(runs) == 1:
        run = runs[0]
        print_lines(console, [f"{run.name}: {words.status(run)}"])
        _show(console, tables.results_table(run))
        print_lines(console, words.headlines(run))
        if run.deploy_summary is not None and run.command != "deploy":
            _show(console, deploy_table(run.deploy_summary, run.data))
            print_lines(console, [*map(words.sentence, run.deploy_summary.sentences)])
        return
    _show(console, comparison.runs_table(runs))
    repeated = comparison.repeats(runs)
    if repeated:
        _show(console, comparison.repeats_table(repeated, runs[0].data.tested))
    print_lines(console, comparison.verdicts(runs))
    for run in runs:
        if run.missing is not None:
            print_lines(console, [f"{run.name} is {words.status(run)}"])


def _show(console: Console, table: Table) -> None:
    print_table(console, table)
    if table.note:
        console.print(table.note, soft_wrap=True)


def _csv(runs: Sequence[Run]) -> str:
    from selfkd.reporting.comparison_page import record_fields, records

    text = io.StringIO()
    writer = csv.DictWriter(text, record_fields(runs), lineterminator="\n")
    writer.writeheader()
    rows = (_finite(row) for run in runs for row in records(run))
    writer.writerows({key: _harmless(value) for key, value in row.items()} for row in rows)
    return text.getvalue()


def _harmless(value: Any) -> Any:
    r"""Return a cell that no spreadsheet takes for a formula; numbers stay what they are.

    >>> _harmless("=1+1"), _harmless("a-b"), _harmless(-0.5)
    ("'=1+1", 'a-b', -0.5)
    """
    if not isinstance(value, str):
        return value
    return "'" * (value.lstrip()[:1] in _FORMULA) + one_line(value)


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


def _put(text: str, output: Path | None) -> int:
    if output is None:
        return print_data(text)
    save_text(output, text)
    return 0


def _fault(message: str, code: int) -> int:
    print_error(message)
    return code


if __name__ == "__main__":
    raise SystemExit(main())
