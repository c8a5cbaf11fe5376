"""A run as one HTML file that loads nothing from any server."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from selfkd.reporting import tables, words
from selfkd.reporting.figures.style import generation_colour
from selfkd.reporting.read import REPORT, Run, read_run
from selfkd.reporting.sections import diagnostics
from selfkd.reporting.sections.arms import capacity_sections, study_sections
from selfkd.reporting.sections.ensemble import ensemble_sections
from selfkd.reporting.sections.generations import generation_sections
from selfkd.reporting.sections.panels import Section
from selfkd.reporting.tables import Table
from selfkd.storage.files import save_text
from selfkd.text import visible

KINDS: Mapping[str, tuple[str, Callable[[Run], Iterable[Section]]]] = {
    "generations": ("born-again generations", generation_sections),
    "ensemble": ("many teachers, one student", ensemble_sections),
    "capacity": ("students of growing size", capacity_sections),
    "study": ("settings side by side", study_sections),
}


@dataclass(frozen=True)
class Script:
    """A script of the page, and the digest by which the page's policy allows it, alone."""

    text: Markup

    @property
    def digest(self) -> Markup:
        """Source of a content security policy."""
        digest = hashlib.sha256(self.text.encode()).digest()
        return Markup(f"'sha256-{base64.b64encode(digest).decode()}'")  # noqa: S704 - base64


@dataclass(frozen=True)
class Link:
    """A model in the chain of teachers."""

    name: str
    hash: str
    colour: str


@dataclass(frozen=True)
class Appendix:
    """A table that stands without a figure."""

    title: str
    table: Table
    text: str = ""
    chain: Sequence[Link] = ()
    folded: bool = False


@dataclass(frozen=True, kw_only=True)
class Page:
    """Content of a page, from top to bottom."""

    kind: str
    title: str
    status: str
    finished: bool
    headlines: Sequence[str]
    facts: Sequence[tuple[str, str]]
    problems: Sequence[str]
    results: Table
    sections: Sequence[Section]
    appendices: Sequence[Appendix]


def write_report(folder: Path, output: Path | None = None) -> Path:
    """Write the report of a run, whole or not at all.

    Args:
        folder: Run folder.
        output: File to write; `report.html` in the run folder when not given.

    Returns:
        The file.

    Raises:
        ConfigError: It is no run folder, or has no result yet.
    """
    output = output or folder / REPORT
    save_text(output, render(run_page(read_run(folder))), patience=0)  # no run waits for it
    return output


def render(page: Page) -> str:
    """Return a page as HTML; every text of it is escaped."""
    scripts = [Script(_trusted(get_plotlyjs())), Script(_trusted(_asset("page.js")))]
    parts: Mapping[str, Any] = vars(page)
    html: str = _template().render(
        **parts,
        scripts=scripts,
        style=_trusted(_asset("page.css")),
        figure_json=_figure_json,
        version=metadata.version("selfkd"),
        now=f"{datetime.now():%Y-%m-%d %H:%M}",
    )
    return html


@cache
def _template() -> Any:
    loader = PackageLoader("selfkd.reporting", "assets")
    environment = Environment(
        loader=loader,
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        finalize=_plain,
    )
    return environment.get_template("page.html")


def _plain(value: object) -> object:
    """Return a text that any file can hold; what this package has written stays as it is."""
    return visible(value) if isinstance(value, str) and not isinstance(value, Markup) else value


def _asset(name: str) -> str:
    return (resources.files("selfkd.reporting") / "assets" / name).read_text(encoding="utf-8")


def _trusted(text: str) -> Markup:
    return Markup(text)  # noqa: S704 - files of this package and of plotly


def _figure_json(figure: go.Figure) -> Markup:
    """Return a figure as JSON that ends no script element."""
    text: str = figure.to_json(validate=False, engine="json")  # of ASCII, whatever the names are
    for sign in "<>&":
        text = text.replace(sign, f"\\u{ord(sign):04x}")
    return Markup(text)  # noqa: S704 - holds no character that HTML takes for markup


def run_page(run: Run) -> Page:
    """Return what the report of a run shows."""
    kind, sections = KINDS[run.command]
    return Page(
        kind=kind,
        title=run.name,
        status=words.status(run),
        finished=run.finished,
        headlines=words.headlines(run),
        facts=_facts(run),
        problems=run.problems,
        results=tables.results_table(run),
        sections=[section for section in sections(run) if section.panels],
        appendices=[part for part in _appendices(run) if part.table.rows],
    )


def _facts(run: Run) -> list[tuple[str, str]]:
    sizes = run.facts.items if run.facts is not None else {}
    split = " / ".join(f"{sizes[name]:,}" for name in ("train", "val", "test") if name in sizes)
    parameters = run.results[-1].parameters if run.results else None
    student = run.get("student.name")
    model = str(run.get("model.name", "")) + (f" → {student}" if student else "")
    started = run.starts[-1].get("started") if run.starts else None
    facts = [
        ("data", str(run.get("data.name", ""))),
        (f"train / val / test {run.unit}", split),
        ("model", model),
        ("parameters", words.size(parameters)),
        ("models trained", str(run.trained)),
        ("seed", str(run.get("seed", ""))),
        ("started", str(started or "")[:16].replace("T", " ")),
    ]
    return [(name, value) for name, value in facts if value]


def _appendices(run: Run) -> list[Appendix]:
    seconds = sum(result.seconds for result in run.results)
    cost = f"{run.trained} models were trained" + (
        f"; the generations took {words.duration(seconds)}." if seconds else "."
    )
    chain = [
        Link(f"generation {result.generation}", result.hash, generation_colour(result.generation))
        for result in run.results
    ]
    environment = run.starts[-1] if run.starts else {}
    restarts = f"Of the last of {len(run.starts)} starts." if len(run.starts) > 1 else ""
    tested = [model for model in run.generations or run.students if model.diagnostics]
    return [
        Appendix(
            "Calibration",
            diagnostics.calibration_table(tested),
            "Best T divides all logits: it has the lowest NLL on validation (Guo et al., 2017).",
        ),
        Appendix("Lineage", tables.lineage_table(run), chain=chain),
        Appendix("Members", tables.members_table(run), "The best on validation first."),
        Appendix("Cost", tables.cost_table(run), cost),
        Appendix(
            "Environment",
            tables.tree_table(environment),
            f"The machine that the run was started on. {restarts}",
        ),
        Appendix("Config", tables.tree_table(run.config), "As in config.yaml.", folded=True),
    ]
