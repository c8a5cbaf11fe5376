"""The tables of a report: what stands behind each figure, as text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from selfkd.reporting import words
from selfkd.reporting.read import DISTILL, Generation, Run
from selfkd.results import Curve, Estimate, Measured, Result, Study, Trial

MOST_ROWS = 200
"""Of a table of classes or trials: a page stays readable."""


@dataclass(frozen=True)
class Table:
    """Texts in rows; the first column names the row."""

    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    texts: bool = False
    """Whether the cells are words, which stand left."""

    def without_empty(self) -> Table:
        """Return the table without columns that say nothing."""
        kept = [
            place
            for place in range(len(self.head))
            if place == 0 or any(row[place] for row in self.rows)
        ]
        return Table(
            tuple(self.head[place] for place in kept),
            tuple(tuple(row[place] for place in kept) for row in self.rows),
            self.note,
            self.texts,
        )


def results_table(run: Run) -> Table:
    """Return the table of a run, as its command prints it, or what it has trained so far."""
    if run.compression is not None:
        return compression_table(run.compression.rows)
    if run.curve is not None:
        return capacity_table(run.curve)
    if run.study is not None:
        return study_table(run.study)
    return generations_table(run) if run.generations else cost_table(run)


def generations_table(run: Run) -> Table:
    """Return a row a generation, then their ensemble and the controls."""
    rows = [_generation_row(run, generation) for generation in run.generations]
    if run.ensemble is not None:
        rows.append(_ensemble_row(run.ensemble))
    rows += [
        (
            *(control.title or control.name, "", "", "", "", words.mean(control.mean)),
            *(words.points(control.first), "", "", "", ""),
        )
        for control in run.controls
    ]
    head: tuple[str, ...] = (
        "generation",
        "T",
        "alpha",
        _column(run.metric),
        "test acc",
        "fresh seeds",
    )
    head += ("vs gen. 0, points", "vs teacher, points", "NLL", "ECE", "agrees")
    return Table(head, tuple(rows)).without_empty()


def _column(metric: str) -> str:
    return {"val_accuracy": "val acc"}.get(metric, metric)


def _generation_row(run: Run, generation: Generation) -> tuple[str, ...]:
    result, confirmed = generation.result, generation.confirmation
    if result is None:
        return (f"{generation.number} (unfinished)", *[""] * 10)
    return (
        str(generation.number),
        words.number(result.temperature, ".2f"),
        words.number(result.alpha, ".2f"),
        words.measured(run, result.value(run.metric)),
        words.percent(result.test_accuracy),
        words.confirmed(confirmed),
        words.gained(confirmed, "first"),
        words.gained(confirmed, "previous"),
        words.number(result.test_nll),
        words.number(result.test_ece),
        words.percent(result.agreement),
    )


def _ensemble_row(row: Measured) -> tuple[str, ...]:
    return (
        *("ensemble of all", "", "", words.percent(row.val_accuracy)),
        *(words.percent(row.test_accuracy), "", "", ""),
        *(words.number(row.test_nll), words.number(row.test_ece), ""),
    )


def all_trials_table(run: Run) -> Table:
    """Return a row a trial of all generations: the points of the figure of accuracies."""
    rows = [
        (
            f"generation {generation.number}, trial {trial.trial}",
            words.measured(run, trial.value(run.metric)),
            _what_became(trial, generation.result.trial if generation.result else None),
            words.percent(chosen.test_accuracy) if chosen else "",
        )
        for generation in run.generations
        for trial in generation.trials
        for chosen in [_if_chosen(generation, trial)]
    ]
    head = ("trial", _column(run.metric), "", "test acc")
    note = left_out(len(rows), "trials")
    return Table(head, tuple(rows[:MOST_ROWS]), note).without_empty()


def _if_chosen(generation: Generation, trial: Trial) -> Result | None:
    result = generation.result
    return result if result is not None and result.trial == trial.trial else None


def trials_table(run: Run, trials: Sequence[Trial], chosen: int | None) -> Table:
    """Return a row a trial: what was tried and what it gave."""
    keys = sorted({key for trial in trials for key in trial.point}, key=_distill_first)
    short = {"distill.temperature": "T", "distill.alpha": "alpha"}
    head = ("trial", *(short.get(key, key) for key in keys), _column(run.metric), "seconds", "")
    rows = [
        (
            str(trial.trial),
            *(_setting(trial.point.get(key)) for key in keys),
            words.measured(run, trial.value(run.metric)),
            f"{trial.train_seconds:.1f}",
            _what_became(trial, chosen),
        )
        for trial in trials[:MOST_ROWS]
    ]
    return Table(head, tuple(rows), left_out(len(trials), "trials")).without_empty()


def _distill_first(key: str) -> tuple[int, str]:
    return (DISTILL.index(key) if key in DISTILL else len(DISTILL)), key


def _what_became(trial: Trial, chosen: int | None) -> str:
    if trial.status == "failed":
        return f"failed: {trial.error or 'no reason is known'}"
    if trial.trial == chosen:
        return "chosen"
    return "stopped early" if trial.status == "stopped" else ""


def _setting(value: Any) -> str:
    return "" if value is None else format(value, ".3g") if isinstance(value, float) else str(value)


def left_out(count: int, what: str) -> str:
    """Return what to say of a long table that is cut."""
    return f"The first {MOST_ROWS} of {count} {what}." if count > MOST_ROWS else ""


def curve_table(names: Sequence[str], curves: Sequence[Mapping[int, float]], form: str) -> Table:
    """Return a row an epoch, a column a curve."""
    epochs = sorted({epoch for curve in curves for epoch in curve})
    rows = [
        (str(epoch), *(words.number(curve.get(epoch), form) for curve in curves))
        for epoch in epochs[:MOST_ROWS]
    ]
    return Table(("epoch", *names), tuple(rows), left_out(len(epochs), "epochs"))


def cost_table(run: Run) -> Table:
    """Return what was spent: time, trials, parameters."""
    rows = [_cost_row(g.result) for g in run.generations if g.result is not None]
    for name, trials in run.stages.items():
        failed = sum(trial.status == "failed" for trial in trials)
        seconds = sum(trial.train_seconds for trial in trials)
        rows.append((name, str(len(trials)), str(failed or ""), f"{seconds:.1f}", "", ""))
    if run.further:
        failed = sum(trial.status == "failed" for trial in run.further)
        spent = f"{sum(trial.train_seconds for trial in run.further):.1f}"
        name = "fresh seeds and controls"
        rows.append((name, str(len(run.further)), str(failed or ""), spent, "", ""))
    others = [*run.further, *(trial for trials in run.stages.values() for trial in trials)]
    seconds = sum(result.train_seconds for result in run.results)
    seconds += sum(trial.train_seconds for trial in others)
    wall = sum(result.seconds for result in run.results)
    rows.append(("all", str(run.trained), "", f"{seconds:.1f}", f"{wall:.1f}" if wall else "", ""))
    first = "generation" if run.command == "generations" else "stage"
    head = (first, "models trained", "failed", "seconds of training", "seconds in all")
    return Table((*head, "parameters"), tuple(rows)).without_empty()


def _cost_row(result: Result) -> tuple[str, ...]:
    return (
        str(result.generation),
        str(result.trials),
        str(result.failed or ""),
        f"{result.train_seconds:.1f}",
        f"{result.seconds:.1f}",
        words.size(result.parameters),
    )


def lineage_table(run: Run) -> Table:
    """Return who taught whom, by the hashes of the models."""
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
    return Table(("model", "hash", "taught by"), tuple(rows), texts=True)


def members_table(run: Run) -> Table:
    """Return the models that teach, the best on validation first."""
    rows = [
        (
            str(row.get("hash", "")),
            str(row["model"].get("name", "")) if isinstance(row.get("model"), dict) else "",
            words.percent(_number(row.get("val_accuracy"))),
            words.number(_number(row.get("val_nll"))),
        )
        for row in run.members
    ]
    return Table(("hash", "model", "val acc", "val NLL"), tuple(rows))


def _number(value: Any) -> float | None:
    return value if isinstance(value, int | float) else None


def compression_table(rows: Sequence[Measured]) -> Table:
    """Return the table of teachers and student: what each is worth and costs."""
    head = ("model", "val acc", "test acc", "NLL", "ECE", "parameters", "ms, 1", "ms, 128")
    texts = []
    for row in rows:
        test = words.percent(row.test_accuracy)
        if row.low is not None and row.high is not None:
            test += f" ± {(row.high - row.low) / 2:.2%}"
        texts.append(
            (
                *(row.name, words.percent(row.val_accuracy), test, words.number(row.test_nll)),
                *(words.number(row.test_ece), words.size(row.parameters)),
                *(words.number(row.ms_1, ".3g"), words.number(row.ms_128, ".3g")),
            )
        )
    return Table(head, tuple(texts), "ms an image, of 1 and of 128 at once, on one thread.")


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


def capacity_table(curve: Curve) -> Table:
    """Return a row a size, the smallest first, then the teacher."""
    rows = [
        (
            str(size.value_),
            words.size(size.parameters),
            words.mean(size.labels),
            words.mean(size.taught),
            words.points(size.difference),
            words.p_value(size.p_holm),
            size.verdict,
        )
        for size in curve.sizes
    ]
    teacher = curve.teacher
    accuracy = words.percent(teacher.test_accuracy)
    rows.append(("teacher", words.size(teacher.parameters), accuracy, "", "", "", ""))
    head = (curve.key.rpartition(".")[2], "params", "labels only", "distilled")
    return Table((*head, "difference, points", "p, Holm", "distillation"), tuple(rows))


def study_table(study: Study) -> Table:
    """Return a row an arm, in the order of the config, then the teachers from elsewhere."""
    rows = [
        (
            arm.name,
            str(len(arm.runs)),
            _errors(arm.errors),
            words.mean(arm.mean),
            words.percent(arm.val_accuracy),
            words.mean(arm.agreement),
            _errors(arm.biased_errors),
            _errors(arm.all_biased_errors),
        )
        for arm in study.arms
    ]
    if study.members is not None:
        members = study.members
        errors = words.number(members.errors, ".0f")
        accuracies = words.percent(members.test_accuracy), words.percent(members.val_accuracy)
        rows.append((f"members ({members.count})", "", errors, *accuracies, "", "", ""))
    head = ("arm", "seeds", "test errors", "test acc", "val acc", "agreement")
    return Table((*head, "errors, one bias", "errors, biases"), tuple(rows)).without_empty()


def _errors(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    text = words.number(estimate.value_, ".1f")
    if estimate.low is None or estimate.high is None:
        return text
    return f"{text} ± {(estimate.high - estimate.low) / 2:.1f}"
