"""The figures of a run of generations."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from selfkd.experiments.confirm import LABELS
from selfkd.reporting import tables, words
from selfkd.reporting.figures import charts
from selfkd.reporting.figures.style import Bar, Gain, Line, Measure
from selfkd.reporting.read import Generation, Run
from selfkd.reporting.sections.diagnostics import diagnosis_sections
from selfkd.reporting.sections.panels import (
    Panel,
    Section,
    bar,
    measure,
    measure_of,
    response,
    settings,
    values,
)
from selfkd.reporting.tables import Table
from selfkd.results import Interval, Replicated, TrialResult, find_metric, title


def generation_sections(run: Run) -> Iterator[Section]:
    """Yield the gain, the search, calibration, learning curves and classes."""
    yield Section("", tuple(_gain(run)))
    yield Section("Search on validation", (*_map(run), *_trials(run)))
    yield from diagnosis_sections(run)
    yield Section("Generated text", tuple(_generated(run)))
    yield Section("Learning", tuple(_learning(run)))


# --- gain over generation 0 ---


def _gain(run: Run) -> Iterator[Panel]:
    """Yield the gain over generation 0 on fresh seeds, else that of the chosen models."""
    known = {g.number: g.confirmation for g in run.generations if g.confirmation is not None}
    compared = any(row.first is not None for row in known.values())
    metric = next(iter(known.values())).metric if compared else _tested(run)
    if compared:
        rows = [
            _of_seeds(run, number, row, _baseline(run, number)) for number, row in known.items()
        ]
        found = [row for row in rows if row is not None]
    else:
        found = _of_chosen(run, metric)
    if len(found) < 2:
        return
    beside = _beside(run, _baseline(run, 1), metric) if compared else []
    of, name = find_metric(metric), title(metric)
    larger = of.mode == "max" and (of.is_fraction or run.mode == "max" or metric != run.metric)
    zero = "the student's network from labels" if _has_own_baseline(run) else "generation 0"
    unit = "points" if of.is_fraction else name if larger else f"{name}, less is better"
    head = f"{name[:1].upper()}{name[1:]} over {zero}"
    shown = Measure(name, percent=of.is_fraction, larger_is_better=larger)
    yield Panel(
        head,
        _gain_text(run, compared=compared, beside=beside),
        charts.gains(
            *(found, beside),
            measure=shown,
            title=f"{head} by generation",
            axis=unit,
        ),
        gain_table([*found[not found[0].number :], *beside], shown),
    )


def _tested(run: Run) -> str:
    """Return the metric of the chosen models that is shown where none is replicated."""
    tested = run.data.tested
    return tested if run.results and tested in run.results[-1].metrics else run.metric


def _has_own_baseline(run: Run) -> bool:
    return run.get("student") is not None


def _baseline(run: Run, number: int) -> Replicated | None:
    """Return what the difference of a generation is to."""
    if _has_own_baseline(run):
        name, given = LABELS, run.get("student")
        if isinstance(given, list) and 0 < number <= len(given) and given[number - 1] != given[-1]:
            name = f"{LABELS}_{given.index(given[number - 1]) + 1}"
        return next((control for control in run.controls if control.name == name), None)
    return run.generations[0].confirmation if run.generations else None


def _paired(row: Replicated, base: Replicated | None) -> dict[int, float]:
    if base is None or row.given:
        return {}
    seeds = row.seeds if base.given else base.seeds
    known = dict(zip(seeds, base.values * len(seeds) if base.given else base.values, strict=False))
    pairs = zip(row.seeds, row.values, strict=False)
    return {seed: value - known[seed] for seed, value in pairs if seed in known}


def _of_seeds(run: Run, number: int, row: Replicated, base: Replicated | None) -> Gain | None:
    first: Interval | None = getattr(row, "first", None)
    if first is None:
        if number or _has_own_baseline(run):
            return None
        first = Interval(0.0)
    name = f"generation {number}"
    verdict = run.verdict.comparisons if run.verdict is not None else ()
    called = any(each.name == name and each.outcome != "none" for each in verdict)
    return Gain(name, bar(first), _paired(row, base), number, called or not number)


def _of_chosen(run: Run, metric: str) -> list[Gain]:
    found = [(r.generation, value) for r in run.results if (value := r.metric(metric)) is not None]
    first = found[0][1] if found else 0.0
    return [Gain(f"generation {n}", Bar(value - first), {}, n, n == 0) for n, value in found]


def _beside(run: Run, base: Replicated | None, metric: str) -> list[Gain]:
    """Return the controls, and the ensembles where they are compared with the same."""
    own = _has_own_baseline(run)
    found = [
        Gain(control.title, bar(control.first), _paired(control, base))
        for control in run.controls
        if control.first is not None and not (own and control.name.startswith((LABELS, "seeds")))
    ]
    first = run.results[0].metric(metric) if run.results and not own else None
    ensemble = run.ensemble.metric(metric) if run.ensemble is not None else None
    if first is not None and ensemble is not None:
        found.insert(0, Gain("ensemble of all", Bar(ensemble - first)))
    return found


def _gain_text(run: Run, *, compared: bool, beside: Sequence[Gain]) -> str:
    if not compared:
        return (
            "One chosen model of each generation: there is no interval. The choice was made on "
            "validation."
        )
    lineages = run.verdict is not None and run.verdict.covers == "lineages"
    base = "paired with its own generation 0"
    if (
        run.generations
        and run.generations[0].confirmation
        and run.generations[0].confirmation.given
    ):
        base = "compared with generation 0, which is one given model"
    if _has_own_baseline(run):
        base = "paired with the student's network trained on labels from the same seed"
    text = (
        "Each thin line is one "
        + ("lineage" if lineages else "fresh seed")
        + f", {base}; dots are means, bars their 95 % intervals"
        + (", which cover whole lineages." if lineages else ".")
    )
    if run.verdict is not None and run.verdict.comparisons:
        text += " Filled: better or worse by the test that is corrected for all generations."
    if any("ensemble" in row.name for row in beside):
        text += " Ensembles are compared with the one chosen model of generation 0."
    return text


def gain_table(rows: Sequence[Gain], measure: Measure) -> Table:
    """Return gains with their intervals and the gain of each seed."""
    seeds = sorted({seed for row in rows for seed in row.seeds})[:12]
    head = ("", "points" if measure.percent else "difference", "95 % interval")
    return Table(
        (*head, *(f"seed {seed}" for seed in seeds)),
        tuple(
            (
                row.name,
                measure.gain(row.bar.value),
                ""
                if row.bar.low is None or row.bar.high is None
                else f"[{measure.gain(row.bar.low)}, {measure.gain(row.bar.high)}]",
                *(measure.gain(row.seeds[seed]) if seed in row.seeds else "" for seed in seeds),
            )
            for row in rows
        ),
    ).without_empty()


# --- the search ---


def _map(run: Run) -> Iterator[Panel]:
    distilled = [generation for generation in run.generations if generation.number > 0]
    points = [
        setting
        for generation in distilled
        for setting in settings(
            run, generation.number, generation.trials, _chosen_trial(generation)
        )
    ]
    if not points:
        return
    surface, best = response(run, [(g.number, g.trials) for g in distilled])
    yield Panel(
        "Temperature and alpha",
        f"{len(points)} trials of all generations, each with its generation's number, chosen ones "
        f"ringed; colour: {title(run.metric)} against the mean of the generation. {best}",
        charts.setting_map(points, measure=measure(run), surface=surface),
        _settings_table(run, distilled),
    )


def _settings_table(run: Run, generations: Sequence[Generation]) -> Table:
    """Return the trials of all generations with their settings."""
    parts = [
        (g, tables.trials_table(run, g.trials, g.result.trial if g.result else None))
        for g in generations
        if g.trials
    ]
    widest = max((table.head for _, table in parts), key=len)
    rows = []
    for generation, table in parts:
        for row in table.rows:
            known = dict(zip(table.head, row, strict=True))
            rows.append(
                (f"{generation.number}, {row[0]}", *(known.get(name, "") for name in widest[1:]))
            )
    note = tables.cut_note(len(rows), "trials")
    return Table(("generation, trial", *widest[1:]), tuple(rows[: tables.MOST_ROWS]), note)


def _chosen_trial(generation: Generation) -> TrialResult | None:
    if generation.result is None:
        return None
    wanted = generation.result.trial
    return next((trial for trial in generation.trials if trial.trial == wanted), None)


def _trials(run: Run) -> Iterator[Panel]:
    rows = [
        (g.number, values(run, g.trials), g.result.trial if g.result else None)
        for g in run.generations
    ]
    if not any(found for _, found, _ in rows):
        return
    yield Panel(
        "Each trial by generation",
        "On validation; the ring is the chosen trial. As one of several it is optimistic.",
        charts.trials(rows, measure=measure(run)),
        tables.all_trials_table(run),
    )


# --- what the models generate ---

GENERATED = ("own_nll", "distinct_1", "distinct_2", "distinct_3", "exact_match", "unended")


def _generated(run: Run) -> Iterator[Panel]:
    """Yield how probable the teacher finds what each generation writes, and how it repeats itself.

    Nothing where models generate nothing.
    """
    own = {
        result.generation: value
        for result in run.results
        if (value := result.metric("test_own_nll")) is not None
    }
    if not own:
        return
    metric = find_metric("own_nll")
    shown = "; ".join(f"generation {k} {metric.value(value)}" for k, value in own.items())
    first = ", of generation 0 of itself" if 0 in own else ""
    names = [name for name in GENERATED if any(f"test_{name}" in r.metrics for r in run.results)]
    yield Panel(
        "Own NLL by generation",
        "Mean NLL, under its teacher, of what a generation writes at T = 1 after test prompts"
        f"{first}: {shown}. Of what is written, distinct-n is the share of distinct n-grams.",
        charts.curves(
            [Line("own NLL", list(own), list(own.values()), 1)],
            x="generation",
            measure=measure_of("own_nll"),
        ),
        Table(
            ("generation", *tables.further_head(names)),
            tuple(
                (str(result.generation), *tables.measures(result, "own_nll", names)[2:])
                for result in run.results
            ),
        ).without_empty(),
    )


# --- learning ---


def _learning(run: Run) -> Iterator[Panel]:
    names = [f"generation {result.generation}" for result in run.results]
    numbers = [result.generation for result in run.results]
    histories = [result.history for result in run.results]
    known = {key for history in histories for row in history for key in row.metrics}
    shown = {
        "val_nll": ("NLL on validation", True),
        "hard_loss": ("cross-entropy with the labels, training", True),
    }
    for key, (named, logarithmic) in ({run.metric: (measure(run).title, False)} | shown).items():
        if key not in known:
            continue
        curves = [
            {
                row.epoch: value
                for row in history
                if (value := row.metric(key)) is not None and math.isfinite(value)
            }
            for history in histories
        ]
        yield Panel(
            f"{named[:1].upper()}{named[1:]} by epoch",
            words.sentence(
                f"{named} of the chosen models by epoch{_last(names, curves, words.form(key))}"
            ),
            charts.curves(
                [
                    Line(name, list(curve), list(curve.values()), number)
                    for name, curve, number in zip(names, curves, numbers, strict=True)
                ],
                x="epoch",
                measure=replace(measure_of(key), title=named),
                logarithmic=logarithmic and all(v > 0 for c in curves for v in c.values()),
            ),
            tables.epoch_table(names, curves, words.form(key)),
        )


def _last(names: Sequence[str], curves: Sequence[dict[int, float]], form: str) -> str:
    ends = [
        f"{list(curve.values())[-1]:{form}} of {name}"
        for name, curve in zip(names, curves, strict=True)
        if curve
    ]
    return f"; at the end {', '.join(ends)}" if ends else ""
