"""`python -m selfkd.response`: the effect of T and alpha, from the trials of run folders."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

from rich.box import SIMPLE_HEAD
from rich.table import Table

from selfkd.analysis.response import (
    EVIDENCE,
    Drift,
    Effect,
    Response,
    Trial,
    drift,
    fit_response,
    search_range,
    unfit,
)
from selfkd.cli.output import print_data, print_error, safe_output
from selfkd.cli.terminal import make_console, print_lines
from selfkd.config import Config
from selfkd.errors import ConfigError
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import Facts, Interval, SearchesOfSizes, TrialResult, find_metric
from selfkd.storage.remote import as_path
from selfkd.storage.rows import load_row
from selfkd.text import one_line

USAGE = 2
T = TypeVar("T")
KEYS = ("distill.temperature", "distill.alpha")


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A search over T and alpha: one teacher, one student, many trials."""

    run: str
    name: str
    """Name for people: generation 1, student, …"""
    generation: int | None
    parameters: int | None
    """Size of the student."""
    data: str | None
    """Digest of its training data."""
    trials: list[Trial]
    ranges: tuple[tuple[float, float] | None, tuple[float, float] | None]
    """Searched ranges of temperature and alpha."""
    others: list[str]
    """Other keys that were searched, which count as noise here."""
    metric: str = "accuracy"
    """Metric of the trials on validation."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """A stage with its response, or with the reason why there is none."""

    stage: Stage
    response: Response | None
    reason: str | None


def read_stages(run: str | Path) -> tuple[list[Stage], list[str]]:
    """Return the searches of a run folder, and notes on its damaged files.

    Raises:
        ConfigError: It is no run folder, or one of another format.
    """
    path = as_path(run).expanduser()
    folder, config = RunFolder.open(path, flag="RUN")
    notes: list[str] = []
    facts = _facts(folder.path, notes)
    stages = []
    for name, generation, size, place in _places(folder.path, facts, notes):
        trials = _trials(place, config, notes, metric=f"val_{facts.metric}")
        if trials:
            stages.append(_stage(folder, config, facts, name, generation, size, trials))
    return stages, notes


def _facts(path: Path, notes: list[str]) -> Facts:
    file = path / "data.json"
    return (_read(Facts, file, notes) if file.exists() else None) or Facts()


def _places(
    path: Path, facts: Facts, notes: list[str]
) -> Iterator[tuple[str, int | None, int | None, Path]]:
    """Yield name, generation, parameters and folder of each search with a teacher."""
    size = facts.parameters.get("student")
    for place in sorted(path.glob("generation_*")):
        suffix = place.name.removeprefix("generation_")
        if suffix.isdecimal() and (number := int(suffix)):
            state = "" if (place / "result.json").exists() else ", unfinished"
            own = facts.parameters.get(f"student_{number}", size)  # of a chain
            yield f"generation {number}{state}", number, own, place
    if (path / "student").is_dir():
        yield "student", None, size, path / "student"
    if (path / "students.json").exists():
        found = _read(SearchesOfSizes, path / "students.json", notes)
        for row in found.students if found is not None else ():
            yield f"student {row.value}", None, row.parameters, path / row.search


def _trials(place: Path, config: Config, notes: list[str], *, metric: str) -> list[Trial]:
    trials = []
    for path in sorted(place.glob("trial_*/result.json")):
        row = _read(TrialResult, path, notes)
        value = None if row is None else row.metric(metric)
        if row is None or row.status != "completed" or value is None or not math.isfinite(value):
            continue
        default = (config.distill.temperature, config.distill.alpha)
        setting = [row.point.get(key, own) for key, own in zip(KEYS, default, strict=True)]
        if not all(isinstance(each, int | float) and math.isfinite(each) for each in setting):
            notes.append(f"omitted: {path} is damaged (point: T and alpha are {setting})")
        elif setting[0] <= 0:
            notes.append(f"omitted: {path} is damaged (point: T must be above 0, got {setting[0]})")
        else:
            trials.append((float(setting[0]), float(setting[1]), value))
    return trials


def _stage(
    folder: RunFolder,
    config: Config,
    facts: Facts,
    name: str,
    generation: int | None,
    size: int | None,
    trials: list[Trial],
) -> Stage:
    space = config.space(with_teacher=True)
    ranges: list[tuple[float, float] | None] = []
    for column, key in enumerate(KEYS):
        searched = [float(value) for value in space[key].values] if key in space else []
        ranges.append(search_range([trial[column] for trial in trials], searched))
    return Stage(
        run=folder.path.name,
        name=name,
        generation=generation,
        parameters=size,
        data=facts.fingerprints.get("train"),
        trials=trials,
        ranges=(ranges[0], ranges[1]),
        others=[key for key in space if key not in KEYS],
        metric=facts.metric,
    )


def _read(kind: type[T], path: Path, notes: list[str]) -> T | None:
    """Return a row; of a damaged one None, and a note that names it."""
    try:
        return load_row(kind, path)
    except (ValueError, OSError) as error:
        notes.append(f"omitted: {error}")
        return None


def find_responses(stages: Sequence[Stage], *, seed: int = 0) -> list[Found]:
    """Fit each search's response."""
    found = []
    for stage in stages:
        t_range, alpha_range = stage.ranges
        metric = find_metric(stage.metric)
        response = fit_response(
            stage.trials, temperatures=t_range, alphas=alpha_range, mode=metric.mode, seed=seed
        )
        reason = unfit(stage.trials, label=metric.label)
        found.append(Found(stage=stage, response=response, reason=reason))
    return found


def find_drifts(found: Sequence[Found]) -> list[tuple[str, str, Drift]]:
    """Return the drift of the best point: over each run's generations, and with student size.

    Returns:
        Of each drift, what it is over and its unit, both in words, and the drift.
    """
    fitted = [(each.stage, each.response) for each in found if each.response is not None]
    drifts = []
    for run in dict.fromkeys(stage.run for stage, _ in fitted):
        own = [(s.generation, r) for s, r in fitted if s.run == run and s.generation is not None]
        moved = drift([float(n) for n, _ in own], [r for _, r in own]) if own else None
        if moved is not None:
            drifts.append((f"over the generations of {run}", "a generation", moved))
    sized = [(s.parameters, r) for s, r in fitted if s.parameters]
    moved = drift([math.log10(n) for n, _ in sized], [r for _, r in sized]) if sized else None
    if moved is not None:
        drifts.append(("with the student's size", "ten times the parameters", moved))
    return drifts


# --- in words ---


def describe_effect(
    name: str, effect: Effect | None, noise: float, *, metric: str = "accuracy"
) -> str:
    """Return whether a metric depends on T or alpha, in words."""
    if effect is None:
        return f"{name} was not searched"
    of = find_metric(metric)
    high = effect.change.high or 0.0
    most = f"moves it by at most {of.with_unit(high)}"
    if effect.probability >= EVIDENCE:
        return (
            f"{of.label} depends on {name}, which moves it by {of.with_unit(effect.change.value)} "
            f"(sd over its range); {effect.share:.0%} of all that T and alpha do is {name}'s alone"
        )
    if high < noise:
        scatter = f"trials scatter by {of.with_unit(noise)}"
        return f"{of.label} hardly depends on {name}, which {most}, and {scatter}"
    return (
        f"no evidence that {of.label} depends on {name}, and too few trials to rule it out: "
        f"it {most}"
    )


def describe_drift(over: str, unit: str, moved: Drift) -> str:
    """Return a drift in words."""
    parts = []
    for name, slope, neutral in (("T", moved.temperature, 1.0), ("alpha", moved.alpha, 0.0)):
        if slope is None or slope.low is None or slope.high is None:
            continue
        sure = slope.low > neutral or slope.high < neutral
        form = "×{:.2f} [{:.2f}, {:.2f}]" if name == "T" else "{:+.2f} [{:+.2f}, {:+.2f}]"
        change = form.format(slope.value, slope.low, slope.high)
        claim = f"the best {name} drifts" if sure else f"no evidence that the best {name} drifts"
        parts.append(f"{claim}: {change}")
    return f"{over}, for {unit}: " + "; ".join(parts)


def make_response_table(found: Sequence[Found]) -> Table:
    """Return the table of responses, a row a search."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    table.add_column("search", justify="left")
    table.add_column("trials", justify="right")
    metric = find_metric(found[0].stage.metric if found else "accuracy")
    there = f"val {metric.short} there"
    for column in ("best T", "best alpha", there, "T matters", "alpha matters"):
        table.add_column(column, justify="right", no_wrap=True)
    several = len({each.stage.run for each in found}) > 1
    for each in found:
        stage, response = each.stage, each.response
        name = one_line(f"{stage.run}, {stage.name}" if several else stage.name)
        if response is None:
            table.add_row(name, str(len(stage.trials)), "", "", each.reason or "", "", "")
            continue
        effects = (response.temperature, response.alpha)
        table.add_row(
            name,
            str(len(stage.trials)),
            _ranged(response.best_temperature, "{:.3g}"),
            _ranged(response.best_alpha, "{:.2f}"),
            _ranged(response.best_accuracy, "{:.1%}" if metric.is_fraction else "{:.4g}"),
            *("" if effect is None else f"{effect.probability:.0%}" for effect in effects),
        )
    return table


def _ranged(interval: Interval, form: str) -> str:
    value, low, high = interval.value, interval.low, interval.high
    return " ".join([form.format(value), f"[{form.format(low)}, {form.format(high)}]"])


def describe_responses(found: Sequence[Found]) -> list[str]:
    """Return responses and drifts in words, line by line."""
    lines = []
    several = len({each.stage.run for each in found}) > 1
    for each in found:
        stage, response = each.stage, each.response
        if response is None:
            continue
        name = f"{stage.run}, {stage.name}" if several else stage.name
        (low_t, high_t), (low, high), share = response.region_bounds()
        describe = partial(describe_effect, noise=response.noise, metric=stage.metric)
        lines += [
            f"{name}: {describe('T', response.temperature)}",
            f"  {describe('alpha', response.alpha)}",
            f"  indistinguishable from the best with these trials: T {low_t:.3g} to {high_t:.3g} "
            f"and alpha {low:.2f} to {high:.2f}, {share:.0%} of what was searched",
        ]
    lines += [describe_drift(*each) for each in find_drifts(found)]
    others = sorted({key for each in found for key in each.stage.others})
    if others:
        lines.append(f"searched too, and noise to this fit: {', '.join(others)}")
    if len({each.stage.data for each in found}) > 1:
        lines.append("the runs are of different data: a drift with size may be the data's")
    return lines


@safe_output()
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit code."""
    arguments = make_parser().parse_args(argv)
    notes: list[str] = []
    stages: list[Stage] = []
    try:
        for run in arguments.runs:
            own, faults = read_stages(run)
            notes += faults
            stages += own
            if not own:
                metric = _facts(as_path(run).expanduser(), notes).metric
                raise ConfigError(
                    f"RUN must have completed trials with a teacher and a val_{metric}, got {run}"
                )
        if len(measured := {stage.metric for stage in stages}) > 1:
            raise ConfigError(f"RUNs must have the same metric, got {', '.join(sorted(measured))}")
        found = find_responses(stages)
    except (ValueError, OSError) as error:
        print_error("\n".join([str(error), *notes]))
        return USAGE
    console = make_console()
    if arguments.format == "json":
        moved = [
            {"over": over, "unit": unit, **asdict(each)} for over, unit, each in find_drifts(found)
        ]
        tree = {"responses": [asdict(each) for each in found], "drifts": moved, "notes": notes}
        return print_data(json.dumps(tree) + "\n")
    console.print(make_response_table(found))
    legend = _LEGEND.format(*_ends_of(stages[0].metric))
    print_lines(console, [*describe_responses(found), legend, *notes])
    return 0


def make_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = argparse.ArgumentParser(
        prog="python -m selfkd.response",
        description="The effect of T and alpha: accuracy as a fitted function of both.",
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="run folder")
    parser.add_argument("--format", choices=("table", "json"), default="table")
    return parser


_LEGEND = (
    "best: where the fitted surface is {0}, and 95 % of where the best may be; matters: the "
    "probability that {1} depends on it. Validation {1}, one seed a trial."
)


def _ends_of(metric: str) -> tuple[str, str]:
    of = find_metric(metric)
    return ("highest" if of.mode == "max" else "lowest"), of.label


if __name__ == "__main__":
    raise SystemExit(main())
