"""Tables of texts: those of the commands, and one behind each figure of a report."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from selfkd.analysis.kept import score_kept
from selfkd.config import TERMS
from selfkd.reporting import words
from selfkd.reporting.deploy_table import deploy_table
from selfkd.reporting.read import DISTILL, Generation, Run
from selfkd.reporting.table import Table as Table
from selfkd.results import (
    CapacitySummary,
    Evaluation,
    Facts,
    GenerationResult,
    Interval,
    Measured,
    StudySummary,
    TableRow,
    TrialResult,
    find_metric,
    key_on_test,
    with_agreement,
)

FURTHER = Facts().further
"""Further metrics of what is not said."""
MOST_ROWS = 200
"""Number of rows after which a table of classes or trials is cut."""


def results_table(run: Run) -> Table:
    """Return the main table of a run, or its costs so far where it has no results yet."""
    if run.ensemble_summary is not None:
        return ensemble_table(run.ensemble_summary.rows, run.data.metric, run.data.further)
    if run.capacity_summary is not None:
        return capacity_table(run.capacity_summary, run.data.metric)
    if run.study_summary is not None:
        return study_table(run.study_summary, run.data.metric)
    if run.command == "deploy" and run.deploy_summary is not None:
        return deploy_table(run.deploy_summary, run.data)
    return generations_table(run) if run.generations else cost_table(run)


def generations_table(run: Run) -> Table:
    """Return a row a generation, then their ensemble and the controls."""
    sizes = sizes_by_generation(run.results)
    rows = [
        (*_generation_row(run, generation), sizes.get(generation.number, ""))
        for generation in run.generations
    ]
    if run.ensemble is not None:
        rows.append((*_ensemble_row(run, run.ensemble), ""))
    rows += [
        (
            *(control.title, "", "", "", "", words.mean(control.mean, control.metric)),
            *(
                words.bare_difference(control.first, control.metric),
                "",
                *[""] * (len(with_agreement(run.data.further)) + 1),
            ),
        )
        for control in run.controls
    ]
    lineages = run.verdict is not None and run.verdict.covers == "lineages"
    again = "whole lineages" if lineages else "fresh seeds"
    tested = words.short_metric(run.data.tested)
    head = ("generation", "T", "alpha", words.short_metric(run.metric), tested, again)
    unit = words.difference_head(run.data.metric)
    differences = f"vs gen. 0{unit}", f"vs previous{unit}"
    columns = (*head, *differences, *further_head(with_agreement(run.data.further)), "parameters")
    return Table(columns, tuple(rows)).without_empty()


def sizes_by_generation(results: Sequence[GenerationResult]) -> dict[int, str]:
    """Return the number of parameters of each generation in words; none where all are alike."""
    sizes = {row.generation: row.parameters for row in results if row.parameters is not None}
    return {n: words.size(size) for n, size in sizes.items()} if len({*sizes.values()}) > 1 else {}


def further_head(names: Sequence[str]) -> list[str]:
    """Return the heads of the columns of further metrics."""
    return [words.short_metric(name) for name in names]


def _generation_row(run: Run, generation: Generation) -> tuple[str, ...]:
    result, confirmed = generation.result, generation.confirmation
    if result is None:
        further = with_agreement(run.data.further)
        return (f"{generation.number} (unfinished)", *[""] * (7 + len(further)))
    return (
        str(generation.number),
        words.number(result.temperature, ".2f"),
        words.number(result.alpha, ".2f"),
        words.measured(run, result.metric(run.metric)),
        words.value(result.metric(run.data.tested), run.data.tested),
        words.confirmed(confirmed),
        words.gained(confirmed, "first"),
        words.gained(confirmed, "previous"),
        *_further(result, with_agreement(run.data.further)),
    )


def _ensemble_row(run: Run, row: Evaluation) -> tuple[str, ...]:
    _, test, *further = measures(row, run.data.metric, with_agreement(run.data.further))
    val = words.measured(run, row.metric(run.metric))  # chosen by, as in the rows above
    return ("ensemble of all", "", "", val, test, "", "", "", *further)


def measures(row: Measured, metric: str, further: Sequence[str] = FURTHER) -> tuple[str, ...]:
    """Return a metric on validation and test, and further ones on test."""
    return (
        words.value(row.metric(f"val_{metric}"), metric),
        words.value(row.metric(f"test_{metric}"), metric),
        *_further(row, further),
    )


def _further(row: Measured, names: Sequence[str]) -> list[str]:
    found = [(row.metric(key_on_test(name)), find_metric(name)) for name in names]
    return [
        "" if value == 0 and not metric.zero else words.number(value, metric.cell)
        for value, metric in found
    ]


def all_trials_table(run: Run) -> Table:
    """Return a row a trial of all generations, as in the figure of accuracies."""
    rows = [
        (
            f"generation {generation.number}, trial {trial.trial}",
            words.measured(run, trial.metric(run.metric)),
            _outcome(trial, generation.result.trial if generation.result else None),
            words.value(chosen.metric(run.data.tested), run.data.tested) if chosen else "",
        )
        for generation in run.generations
        for trial in generation.trials
        for chosen in [_if_chosen(generation, trial)]
    ]
    head = ("trial", words.short_metric(run.metric), "", words.short_metric(run.data.tested))
    note = cut_note(len(rows), "trials")
    return Table(head, tuple(rows[:MOST_ROWS]), note).without_empty()


def _if_chosen(generation: Generation, trial: TrialResult) -> GenerationResult | None:
    result = generation.result
    return result if result is not None and result.trial == trial.trial else None


def trials_table(run: Run, trials: Sequence[TrialResult], chosen: int | None) -> Table:
    """Return a row a trial: its settings and its metric."""
    keys = sorted({key for trial in trials for key in trial.point}, key=_distill_first)
    short = {"distill.temperature": "T", "distill.alpha": "alpha", TERMS: "terms"}
    named = words.short_metric(run.metric)
    head = ("trial", *(short.get(key, words.short_key(key)) for key in keys), named, "seconds", "")
    rows = [
        (
            str(trial.trial),
            *(words.format_setting(key, trial.point.get(key)) for key in keys),
            words.measured(run, trial.metric(run.metric)),
            f"{trial.train_seconds:.1f}",
            _outcome(trial, chosen),
        )
        for trial in trials[:MOST_ROWS]
    ]
    return Table(head, tuple(rows), cut_note(len(trials), "trials")).without_empty()


def _distill_first(key: str) -> tuple[int, str]:
    return (DISTILL.index(key) if key in DISTILL else len(DISTILL)), key


def _outcome(trial: TrialResult, chosen: int | None) -> str:
    if trial.status == "failed":
        return f"failed: {trial.error or 'no reason is known'}"
    if trial.trial == chosen:
        return "chosen"
    return "stopped early" if trial.status == "stopped" else ""


def cut_note(count: int, what: str) -> str:
    """Return the note of a table that is cut; an empty text for one that is whole."""
    return f"The first {MOST_ROWS} of {count} {what}." if count > MOST_ROWS else ""


def epoch_table(names: Sequence[str], curves: Sequence[Mapping[int, float]], form: str) -> Table:
    """Return learning curves: a row an epoch, a column a curve."""
    epochs = sorted({epoch for curve in curves for epoch in curve})
    rows = [
        (str(epoch), *(words.number(curve.get(epoch), form) for curve in curves))
        for epoch in epochs[:MOST_ROWS]
    ]
    return Table(("epoch", *names), tuple(rows), cut_note(len(epochs), "epochs"))


def cost_table(run: Run) -> Table:
    """Return the costs of a run, of all its trials: models trained, time on workers and in all."""
    parts = [(f"generation {g.number}", g.trials, g.result) for g in run.generations if g.trials]
    rows = [
        _cost_row(name, trials, "" if result is None else f"{result.seconds:.1f}")
        for name, trials, result in parts
    ]
    rows += [_cost_row(name, trials) for name, trials in run.stages.items()]
    seeds = [trial for trial in run.further if trial.stage.startswith("confirm")]
    deployed = [trial for trial in run.further if trial.stage.startswith("deploy")]
    others = [trial for trial in run.further if not trial.stage.startswith(("confirm", "deploy"))]
    name = "controls" if run.command == "generations" else "further models"
    further = (("fresh seeds", seeds), (name if rows else "models", others))
    for title, trials in (*further, ("deployment", deployed)):
        if trials:
            rows.append(_cost_row(title, trials))
    wall = wall_seconds(run)
    whole = f"{train_seconds(run):.1f}", f"{wall:.1f}" if wall else ""
    rows.append(("all", str(run.trained), "", *whole))
    head = ("", "models trained", "failed", "seconds on workers", "seconds of wall time")
    return Table(head, tuple(rows), rules=(len(rows) - 1,)).without_empty()


def _cost_row(name: str, trials: Sequence[TrialResult], wall: str = "") -> tuple[str, ...]:
    failed = sum(trial.status == "failed" for trial in trials)
    seconds = sum(trial.train_seconds for trial in trials)
    return (name, str(len(trials)), str(failed or ""), f"{seconds:.1f}", wall)


def wall_seconds(run: Run) -> float:
    """Return the time that the starts of a run took, each until its last report was written."""
    found = [start.get("seconds") for start in run.starts]
    known = [each for each in found if isinstance(each, int | float) and 0 < each < 1e9]
    return float(sum(known))


def train_seconds(run: Run) -> float:
    """Return the time that all trainings of a run took on their workers."""
    trials = [*run.further, *(trial for rows in run.stages.values() for trial in rows)]
    trials += [trial for generation in run.generations for trial in generation.trials]
    return sum(trial.train_seconds for trial in trials if 0 < trial.train_seconds < 1e9)


def lineage_table(run: Run) -> Table:
    """Return which model was distilled from which, by their hashes."""
    known = {
        model.hash: f"generation {result.generation}" + (f", trial no. {rank + 1}" if rank else "")
        for result in run.results
        for rank, model in enumerate(result.models)
    }
    rows = [
        (
            f"generation {result.generation}",
            result.hash,
            "; ".join(f"{known.get(t.hash, 'elsewhere')} ({t.hash})" for t in result.teachers)
            or "labels only",
        )
        for result in run.results
    ]
    return Table(("model", "hash", "distilled from"), tuple(rows), texts=True)


def members_table(run: Run) -> Table:
    """Return the teachers of an ensemble, the best on validation first."""
    names = [f"val_{run.data.metric}", *(f"val_{name}" for name in run.data.further[:1])]
    rows = [
        (
            row.hash,
            str(row.model.get("name", "")),
            words.value(row.metric(names[0]), names[0]),
            *(words.number(row.metric(name), find_metric(name).cell) for name in names[1:]),
        )
        for row in run.members
    ]
    return Table(("hash", "model", *map(words.short_metric, names)), tuple(rows))


def ensemble_table(
    rows: Sequence[TableRow], metric: str = words.MAIN, further: Sequence[str] = FURTHER
) -> Table:
    """Return the table that `selfkd.ensemble` prints: quality and costs of teachers and student.

    Args:
        rows: Rows of the summary.
        metric: Metric that models are compared by, see `Facts.metric`.
        further: Further metrics, see `Facts.further`.
    """
    short = words.short_metric(metric)
    quality = (f"val {short}", f"test {short}", *further_head(further))
    head = ("model", *quality, "parameters", "ms, 1", "ms, 128")
    texts = []
    for row in rows:
        val, test, *more = measures(row, metric, further)
        if row.low is not None and row.high is not None:
            test += f" ± {words.value((row.high - row.low) / 2, metric)}"
        costs = words.number(row.ms_1, ".3g"), words.number(row.ms_128, ".3g")
        texts.append((row.name, val, test, *more, words.size(row.parameters), *costs))
    note = "ms an item, of 1 and of 128 at once, on one thread."
    students = sum(row.name.startswith("student") for row in rows)
    return Table(head, tuple(texts), note, rules=(len(texts) - students,)).without_empty()


def tree_table(tree: Mapping[str, Any]) -> Table:
    """Return nested settings as dotted keys and values."""
    return Table(("key", "value"), tuple(_flat(tree, "")), texts=True)


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, str]]:
    for key, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in (None, {}, []):
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            yield f"{prefix}{key}", shown


def capacity_table(summary: CapacitySummary, metric: str = words.MAIN) -> Table:
    """Return a row a size, the smallest first, then the teacher.

    Args:
        summary: Summary of the run.
        metric: Metric that models are compared by, see `Facts.metric`.
    """
    teacher = summary.teacher
    reference = teacher.metric(f"test_{metric}")
    rows = [
        (
            str(size.value),
            words.size(size.parameters),
            words.mean(size.labels.interval, metric),
            words.mean(size.distilled.interval, metric),
            words.bare_difference(size.difference, metric),
            words.p_value(size.p_holm),
            size.verdict,
            words.kept(score_kept(size.distilled.runs, reference, metric=metric)),
        )
        for size in summary.sizes
    ]
    tested = words.value(reference, metric)
    rows.append(("teacher", words.size(teacher.parameters), tested, "", "", "", "", ""))
    head = (summary.key.rpartition(".")[2], "params", "labels only", "distilled")
    difference = f"difference{words.difference_head(metric)}"
    columns = (*head, difference, "p, Holm", "distillation", "score kept")
    if not any(row[-1] for row in rows):  # as of a metric of which less is better
        return Table(columns[:-1], tuple(row[:-1] for row in rows))
    return Table(columns, tuple(rows))


def study_table(study: StudySummary, metric: str = words.MAIN) -> Table:
    """Return a row an arm, in the order of the config, then the teachers from elsewhere.

    Args:
        study: Summary of the run.
        metric: Metric that models are compared by, see `Facts.metric`.
    """
    rows = [
        (
            arm.name,
            str(len(arm.runs)),
            _errors(arm.errors),
            words.mean(arm.mean, study.metric or metric),
            "" if study.metric else words.value(arm.metric(f"val_{metric}"), metric),
            words.mean(arm.agreement),
            words.mean(arm.unseen_accuracy),
            words.mean(arm.biased_unseen_accuracy),
            _errors(arm.biased_errors),
            _errors(arm.all_biased_errors),
        )
        for arm in study.arms
    ]
    if study.members is not None:
        members = study.members
        errors = words.number(members.metric("test_errors"), ".0f")
        val, test = measures(members, metric, ())
        rows.append((f"members ({members.count})", "", errors, test, val, "", "", "", "", ""))
    short = words.short_metric(metric)
    own = words.short_metric(study.metric) if study.metric else f"test {short}"
    head = ("arm", "seeds", "test errors", own, f"val {short}", "agreement")
    biased = ("unseen acc", "with one bias", "errors, one bias", "errors, biases")
    return Table((*head, *biased), tuple(rows)).without_empty()


def _errors(estimate: Interval | None) -> str:
    if estimate is None:
        return ""
    text = words.number(estimate.value, ".1f")
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ± {(estimate.high - estimate.low) / 2:.1f}"
