"""The findings of a run in words, the same for a gain and for none; values as texts of a table."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

from selfkd.analysis import verdicts
from selfkd.analysis.kept import describe_kept, share_text, size_kept
from selfkd.analysis.verdicts import (
    NOT_COMPARED,
    count,
    describe_other_data,
    format_difference,
    sentences_of,
    short,
)
from selfkd.config import TERM_WEIGHT, TERMS, Config, choices_of_terms
from selfkd.distill.loss_names import LOSSES, describe_terms
from selfkd.reporting.read import Run
from selfkd.results import (
    CapacitySummary,
    EnsembleSummary,
    GenerationResult,
    Interval,
    Replicated,
    find_metric,
    title,
)

HALVED = 0.5
"""Share of generation 0's distinct 2-grams at which a generation is warned of."""
MAIN = "accuracy"
"""Metric of what is not said."""


def form(metric: str) -> str:
    """Return the format of a metric's values, without zeros at their ends.

    >>> form("val_accuracy"), form("val_nll")
    ('.2%', '.4g')
    """
    return find_metric(metric).form.removeprefix("#")


def percent(value: float | None) -> str:
    """Return a fraction as a percentage; an empty text for None, a dash for NaN."""
    return number(value, ".2%")


def value(value: float | None, metric: str) -> str:
    """Return a value of a metric; an empty text for None, a dash for NaN."""
    return "" if value is None else find_metric(metric).value(value)


def short_metric(metric: str) -> str:
    """Return the name of a metric as a column has it, with its split where there is one.

    >>> short_metric("accuracy"), short_metric("val_nll"), short_metric("val_f1")
    ('acc', 'val NLL', 'val_f1')
    """
    found = find_metric(metric)
    split = metric.removesuffix(found.name)
    return f"{split.removesuffix('_')} {found.short}" if split else found.short


def difference_head(metric: str) -> str:
    """Return the unit of differences of a metric, as the head of a column has it.

    >>> difference_head("accuracy"), difference_head("nll"), difference_head("f1")
    (', points', ', nats', '')
    """
    unit = find_metric(metric).unit
    return f", {unit}" if unit else ""


def right(metric: str, value: float, unit: str) -> str:
    """Return a predicate: how good a model is on the test split.

    >>> right("accuracy", 0.5, "images"), right("nll", 1.234, "tokens")
    ('is right on 50.00% of the test images', 'has test NLL 1.234 nats')
    >>> right("exact_match", 0.5, "tokens")
    'has test exact match 50.00%'
    """
    found = find_metric(metric)
    if _is_accuracy(metric):
        return f"is right on {found.value(value)} of the test {unit}"
    return f"has test {found.label} {found.with_unit(value)}"


def _is_accuracy(metric: str) -> bool:
    """Return whether a metric is the fraction of the items that are right."""
    found = find_metric(metric)
    return found.is_fraction and "acc" in found.name


def number(value: float | None, form: str = ".4f") -> str:
    """Return a number; an empty text for None, a dash for NaN."""
    return "" if value is None else verdicts.number(value, form)


def mean(estimate: Interval | None, metric: str = MAIN) -> str:
    """Return a mean of a metric with half of its interval."""
    if estimate is None:
        return ""
    if estimate.low is None or estimate.high is None:
        return value(estimate.value, metric)
    half = (estimate.high - estimate.low) / 2
    of = form(metric) if find_metric(metric).is_fraction else ".2g"
    return f"{value(estimate.value, metric)} ± {number(half, of)}"


def plus_minus(estimate: Interval | None, metric: str, *, sign: str = "") -> str:
    """Return an estimate of a metric with half its interval, the larger half where they differ."""
    if estimate is None:
        return ""
    text = number(estimate.value, f"{sign}{find_metric(metric).form}")
    if estimate.low is None or estimate.high is None:
        return text
    half = max(estimate.high - estimate.value, estimate.value - estimate.low)
    return f"{text} ± {number(half, form(metric))}"


def p_value(value: float | None) -> str:
    """Return a p value in three digits, or that it is smaller.

    >>> p_value(0.0412), p_value(0.00002)
    ('0.041', '< 0.001')
    """
    return "< 0.001" if value is not None and value < 0.001 else number(value, ".3f")


def difference(estimate: Interval | None, metric: str = MAIN) -> str:
    """Return a difference of a metric with its interval."""
    if estimate is None:
        return ""
    return format_difference(estimate, form=find_metric(metric).difference)


def bare_difference(estimate: Interval | None, metric: str = MAIN) -> str:
    """Return a difference of a metric with its interval, without unit, for a table's cell."""
    return "" if estimate is None else format_difference(estimate, form=find_metric(metric).bare)


def measured(run: Run, value: float | None) -> str:
    """Return a value of the metric that trials are chosen by."""
    return "" if value is None else find_metric(run.metric).value(value)


def confirmed(confirmation: Replicated | None) -> str:
    """Return the mean over fresh seeds with half of its interval, or that of one given model."""
    if confirmation is None:
        return ""
    seeds = " (1 seed)" if confirmation.given else ""
    return f"{mean(confirmation.mean, confirmation.metric)}{seeds}"


def gained(confirmation: Replicated | None, other: Literal["first", "previous"]) -> str:
    """Return the difference to generation 0, or to the previous generation."""
    found: Interval | None = getattr(confirmation, other, None)
    return "" if confirmation is None else bare_difference(found, confirmation.metric)


def warn_of_collapse(results: Sequence[GenerationResult]) -> list[str]:
    """Return a warning for each generation that repeats itself: half as many distinct 2-grams.

    >>> first, last = (
    ...     GenerationResult(generation=k, trial=0, metrics={"test_distinct_2": value})
    ...     for k, value in enumerate((0.9, 0.4))
    ... )
    >>> warn_of_collapse([first, last])
    ['warning: generation 1 repeats itself: distinct 2-grams 40.00%, of generation 0 90.00%']
    """
    name = "test_distinct_2"
    first = results[0].metric(name) if results else None
    return [
        f"warning: generation {result.generation} repeats itself: {find_metric(name).label} "
        f"{value(own, name)}, of generation {results[0].generation} {value(first, name)}"
        for result in results
        if first is not None and (own := result.metric(name)) is not None and own <= HALVED * first
    ]


def duration(seconds: float) -> str:
    """Return a time in seconds, or hours and minutes.

    >>> duration(42.31), duration(600), duration(7260)
    ('42.3 s', '10 min', '2 h 1 min')
    """
    if seconds < 120:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(round(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def size(count: float | None) -> str:
    """Return a number of parameters in three digits."""
    return "" if count is None else short(round(count))


def status(run: Run) -> str:
    """Return whether a run is finished, and what is missing."""
    return "finished" if run.missing is None else f"unfinished: {run.missing}"


def headlines(run: Run) -> list[str]:
    """Return the findings of a run as sentences, the most important first."""
    if run.command == "ensemble":
        return list(_of_ensemble(run))
    if (summary := run.capacity_summary) is not None:
        kept = describe_sizes_kept(summary, run.data.metric)
        return [sentence(line) for line in (*summary.verdict.sentences, *kept, *summary.said)]
    if run.study_summary is not None:
        verdict = run.study_summary.verdict
        return [sentence(line) for line in verdict.sentences] if verdict else []
    if run.command == "deploy":
        deployed = run.deploy_summary
        return [] if deployed is None else [sentence(line) for line in deployed.sentences]
    return list(_of_generations(run))


def _of_generations(run: Run) -> Iterator[str]:
    done = [generation for generation in run.generations if generation.result is not None]
    if run.verdict is not None:
        yield from map(sentence, run.verdict.sentences)
    if run.stopped:
        yield sentence(run.stopped)
    if run.best is not None and run.verdict is None:
        yield from _unconfirmed(run, run.best)
    if run.ensemble is not None and (tested := run.ensemble.metric(run.data.tested)) is not None:
        yield (
            f"The ensemble of all {len(done)} generations "
            f"{right(run.data.metric, tested, run.data.unit)}."
        )
    yield from map(sentence, warn_of_collapse(run.results))
    if not done:
        yield "No generation is finished yet."


def _unconfirmed(run: Run, best: GenerationResult) -> Iterator[str]:
    first = run.results[0]
    yield (
        f"Generation {best.generation} has the best {title(run.metric)}: "
        f"{measured(run, best.metric(run.metric))}{_tests(run, first, best)}."
    )
    if first.origin is not None:
        yield f"Generation 0 is a given model: {first.origin.name}."
        if first.origin.other_data:
            yield sentence(describe_other_data("generation 0"))
    if not run.finished:
        yield "The verdict is made at the end of the run."
    elif any(row.confirmation and row.confirmation.alone for row in run.generations):
        yield sentence(NOT_COMPARED)
    elif len(run.results) > 1:
        yield (
            "Each figure is of one model, so there is no interval and no verdict: confirm.seeds "
            "replicates the chosen settings on fresh seeds."
        )


def _tests(run: Run, first: GenerationResult, best: GenerationResult) -> str:
    tested, of_first = best.metric(run.data.tested), first.metric(run.data.tested)
    if tested is None:
        return ""
    metric = find_metric(run.data.metric)
    text = f"; it {right(run.data.metric, tested, run.data.unit)}"
    if first is not best and of_first is not None:
        on = "on " if _is_accuracy(run.data.metric) else ""
        text += f", generation {first.generation} {on}{metric.with_unit(of_first)}"
    return text


def _of_ensemble(run: Run) -> Iterator[str]:
    if run.ensemble_summary is None:
        yield "The student is not evaluated yet."
        return
    _, *lines = describe_ensemble(run.ensemble_summary, run.data.metric)
    yield from (sentence(line) for line in lines)


def sentence(text: str) -> str:
    """Return a text as a sentence: a capital, a full stop."""
    text = text.strip()
    return text[:1].upper() + text[1:] + ("" if text.endswith((".", "!", "?")) else ".")


def describe_members(config: Config) -> str:
    """Return the members of an ensemble in words, as a config says."""
    members = config.members
    trained = members.trained()
    parts = [f"{count(trained, 'member')} on labels"] if trained else []
    parts += [f"those of {run}" for run in members.runs]
    parts += [f"{len(members.checkpoints)} from files"] if members.checkpoints else []
    return ", ".join(parts)


def describe_ensemble(summary: EnsembleSummary, metric: str = MAIN) -> list[str]:
    """Return the findings of `selfkd.ensemble` in words: the setting, the gain, what is kept.

    Args:
        summary: Summary of the run.
        metric: Metric that models are compared by, see `Facts.metric`.
    """
    chosen, share = summary.chosen, summary.share
    setting = f"chosen of {summary.trials} trials on validation: "
    if chosen.temperature is None or chosen.alpha is None:
        setting += "trained on the text of its teachers"
    else:
        setting += (
            f"T {chosen.temperature:.3g}, alpha {chosen.alpha:.3g}, average of {chosen.average}"
        )
    lines = [setting, *sentences_of(summary)]
    if share is None and not summary.alone:
        lines.append("share of the teacher's gain kept: none, the teacher gains nothing on it")
    elif share is not None:
        ends = "" if share.low is not None else " (no interval: too little is known for one)"
        value = format_difference(share, form=share_text)
        lines.append(f"share of the teacher's gain kept: {value}{ends}")
    return [*lines, *describe_student_kept(summary, metric)]


def kept(share: Interval | None) -> str:
    """Return the share of a score that is kept, with its interval, in percent; empty for None."""
    return "" if share is None else format_difference(share, form=share_text)


def describe_student_kept(summary: EnsembleSummary, metric: str) -> list[str]:
    """Return in a sentence what the student keeps of its teacher's score and size, if known."""
    student, teacher = summary.rows[-1], summary.teacher
    tested = student.metric(f"test_{metric}")
    runs = student.runs or (() if tested is None else (tested,))
    text = describe_kept(
        "the student",
        "the teacher",
        runs,
        teacher.metric(f"test_{metric}"),
        metric=metric,
        size=size_kept(student.parameters, teacher.parameters),
    )
    return [text] if text else []


def describe_sizes_kept(summary: CapacitySummary, metric: str) -> list[str]:
    """Return what the smallest and the largest distilled student keep of their teacher, if known.

    Args:
        summary: Summary of the run.
        metric: Metric that models are compared by, see `Facts.metric`.
    """
    teacher = summary.teacher
    texts = [
        describe_kept(
            f"the distilled student of {short(size.parameters)} parameters",
            "the teacher",
            size.distilled.runs or (size.distilled.value,),
            teacher.metric(f"test_{metric}"),
            metric=metric,
            size=size_kept(size.parameters, teacher.parameters),
        )
        for size in (*summary.sizes[:1], *summary.sizes[1:][-1:])
    ]
    return [text for text in texts if text]


def short_key(key: str) -> str:
    """Return a dotted config key as it stands before its value; the weight of a term is short.

    >>> short_key("distill.terms.hint.weight"), short_key("train.lr")
    ('hint weight', 'train.lr')
    """
    found = TERM_WEIGHT.fullmatch(key)
    return f"{found[1]} weight" if found else key


def format_setting(key: str, value: Any) -> str:
    """Return the value of a dotted config key in words.

    >>> format_setting("train.lr", 0.05), format_setting("distill.terms", [{"name": "pkt"}])
    ('0.05', '1 pkt')
    """
    if key == TERMS and isinstance(value, list | tuple):
        return describe_terms(value)
    return "" if value is None else format(value, ".3g") if isinstance(value, float) else str(value)


def describe_live(config: Config) -> list[str]:
    """Return in words for which terms teachers are run at every step, and what that costs."""
    arms = {name: config.at(arm.set) for name, arm in config.study.arms.items() if arm.teachers}
    found = {
        str(term["name"])
        for own in (arms.values() if arms else [config])
        for terms in choices_of_terms(own)
        for term in terms
        if term.get("student") is not None
    }
    if not found:
        return []
    names = ", ".join(name for name in LOSSES if name in found)
    verb = "compares" if len(found) == 1 else "compare"
    where = [name for name, own in arms.items() if own.distill.runs_teacher]
    students = f"students of {', '.join(where)}" if where else "students with a teacher"
    return [
        f"{students} run their teacher at every step, as {names} {verb} layers: a step takes one "
        "forward pass of the teacher more, about a third of a step of the teacher's own training"
    ]
