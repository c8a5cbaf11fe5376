"""A run as one HTML file that loads nothing from any server."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from importlib import metadata, resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from selfkd.config import AugmentConfig
from selfkd.experiments.run_folder import BEST
from selfkd.reporting import tables, words
from selfkd.reporting.figures.style import Figure, colour
from selfkd.reporting.read import REPORT, Run, read_run
from selfkd.reporting.sections import diagnostics
from selfkd.reporting.sections.arms import capacity_sections, study_sections
from selfkd.reporting.sections.deploy import deploy_sections
from selfkd.reporting.sections.ensemble import ensemble_sections
from selfkd.reporting.sections.gallery import Gallery, make_gallery
from selfkd.reporting.sections.generations import generation_sections
from selfkd.reporting.sections.panels import Panel, Section
from selfkd.reporting.sections.teacher import teacher_sections
from selfkd.reporting.tables import Table
from selfkd.storage.files import save_text
from selfkd.text import shell_quote, visible

KINDS: Mapping[str, tuple[str, Callable[[Run], Iterable[Section]]]] = {
    "generations": ("born-again generations", generation_sections),
    "ensemble": ("many teachers, one student", ensemble_sections),
    "capacity": ("students of growing size", capacity_sections),
    "study": ("settings side by side", study_sections),
    "deploy": ("a model that is served", lambda run: ()),
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
    lead: Panel | None = None
    """Figure of the first screen."""
    use: Sequence[tuple[str, str]] = ()
    """What to do with the model: words and code."""
    gallery: Gallery | None = None
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
    parts: Mapping[str, Any] = vars(page)
    html: str = _template().render(
        **parts,
        script=Script(_asset("page.js")),
        style=_asset("page.css"),
        drawing=_asset("figure.css"),
        version=metadata.version("selfkd"),
        now=f"{datetime.now():%Y-%m-%d %H:%M}",
    )
    return html


def render_figure(figure: Figure) -> str:
    """Return a page of a figure alone."""
    head = Markup('<!doctype html><meta charset="utf-8"><style>{}</style>{}')
    return str(head.format(_asset("figure.css"), figure.markup()))


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


def _asset(name: str) -> Markup:
    text = (resources.files("selfkd.reporting") / "assets" / name).read_text(encoding="utf-8")
    return Markup(text)  # noqa: S704 - a file of this package


def run_page(run: Run) -> Page:
    """Return what the report of a run shows."""
    kind, make_sections = KINDS[run.command]
    made = list(make_sections(run))
    made += teacher_sections(run)
    made[1:1] = deploy_sections(run)  # the figure of the first screen comes before it
    sections = [section for section in made if section.panels or section.links]
    lead = sections.pop(0).panels[0] if sections and not sections[0].title else None
    return Page(
        kind=kind,
        title=run.name,
        status=words.status(run),
        finished=run.finished,
        headlines=words.headlines(run),
        facts=_facts(run),
        problems=run.problems,
        results=tables.results_table(run),
        lead=lead,
        use=_use(run),
        gallery=make_gallery(run),
        sections=sections,
        appendices=[part for part in _appendices(run) if part.table.rows],
    )


def _use(run: Run) -> list[tuple[str, str]]:
    """Return the lines by which a run's model is loaded, and the run made again."""
    if run.command not in ("generations", "ensemble"):
        return []
    path = str(run.path)
    if (here := Path.cwd().absolute()) in run.path.parents:
        path = str(run.path.relative_to(here))
    lines = []
    if run.best is not None and run.best.models:
        kept = (run.path / BEST).exists()  # from the end of a run on
        file = f"{path}/{BEST if kept else run.best.models[0].checkpoint}"
        lines.append((f"File, generation {run.best.generation}, the best on validation", file))
    if run.best is not None or run.ensemble_summary is not None:
        arrays = run.get("data.name") == "arrays"
        items = "features" if arrays else run.get("task", "images")
        load = f"import selfkd\nmodel = selfkd.load({json.dumps(path)})\nmodel.predict({items})"
        lines.append(("Load it in Python", load))
    command = f"python -m selfkd.{run.command} --config {shell_quote(f'{path}/config.yaml')}"
    lines.append(("Run it again", f"{command} --name {shell_quote(f'{run.name}-again')}"))
    return lines


def _facts(run: Run) -> list[tuple[str, str]]:
    sizes = run.facts.items if run.facts is not None else {}
    split = " / ".join(f"{sizes[name]:,}" for name in ("train", "val", "test") if name in sizes)
    parameters = run.results[-1].parameters if run.results else None
    model = " → ".join([str(run.get("model.name", "")), *run.student_names])
    size = words.size(parameters)
    if len(run.student_names) > 1:  # a chain, whose networks are of several sizes
        size = " → ".join(tables.sizes_by_generation(run.results).values()) or size
    started = run.starts[-1].get("started") if run.starts else None
    facts = [
        ("data", str(run.get("data.name", ""))),
        (f"train / val / test {run.data.unit}", split),
        ("transfer set", f"{run.facts.transfer:,}" if run.facts and run.facts.transfer else ""),
        ("augmentation", _augmentation(run)),
        ("side at test", str(run.get("data.test_size") or "")),
        ("model", model),
        ("parameters", size),
        ("models trained", str(run.trained)),
        *_times(run),
        ("seed", str(run.get("seed", ""))),
        ("started", str(started or "")[:16].replace("T", " ")),
    ]
    return [(name, value) for name, value in facts if value]


def _augmentation(run: Run) -> str:
    """Return in words what a config does to training images; of a study, where no arm differs."""
    own, default = run.get("data.augment"), vars(AugmentConfig())
    given = {key: run.get(f"data.{key}") for key in ("crop", "flip", "jitter")}
    given = {key: value for key, value in given.items() if value}
    if isinstance(own, Mapping):
        given |= {key: own[key] for key in default if own.get(key, default[key]) != default[key]}
    views = {key: run.get(f"data.{key}") for key in ("views", "repeats")} if given else {}
    views = {key: value for key, value in views.items() if value not in (None, 1)}
    preset = [str(given.pop("preset"))] if "preset" in given else []
    said = {True: "", False: "no "}
    parts = [f"{said[value]}{key}" if isinstance(value, bool) else f"{key} {value}"
             for key, value in (given | views).items()]  # fmt: skip
    return ", ".join([*preset, *parts])


def _times(run: Run) -> list[tuple[str, str]]:
    times = (
        ("wall time", tables.wall_seconds(run)),
        ("time on workers", tables.train_seconds(run)),
    )
    return [(name, words.duration(seconds)) for name, seconds in times if seconds]


def _appendices(run: Run) -> list[Appendix]:
    cost = f"{run.trained} models were trained, all of them counted"
    cost += "".join(f"; {name}: {text}" for name, text in _times(run)) + "."
    chain = [
        Link(f"generation {result.generation}", result.hash, colour(result.generation))
        for result in run.results
    ]
    environment = run.starts[-1] if run.starts else {}
    restarts = f"Of the last of {len(run.starts)} starts." if len(run.starts) > 1 else ""
    tested = [model for model in run.pair or run.students if model.diagnostics]
    best = "Best T divides all logits: it has the lowest NLL on validation (Guo et al., 2017)."
    fitted = any(found.scaled for model in tested for found in model.diagnostics.values())
    return [
        Appendix("Calibration", diagnostics.calibration_table(tested), best if fitted else ""),
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
