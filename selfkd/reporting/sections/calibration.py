"""The tables of calibration, of agreement with the teacher, of confusions and classes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from selfkd.reporting import words
from selfkd.reporting.read import Generation, Run
from selfkd.reporting.schema import Confusion
from selfkd.reporting.tables import MOST_ROWS, Table, left_out

Pair = tuple[int | str, int | str]


def calibration_table(generations: Sequence[Generation]) -> Table:
    """Return calibration on validation and test, as it is and after one temperature."""
    head: tuple[str, ...] = ("generation", "split", "NLL", "Brier", "ECE", "best T")
    head += ("NLL at best T", "Brier at best T", "ECE at best T")
    return Table(head, tuple(_calibrations(generations))).without_empty()


def _calibrations(generations: Sequence[Generation]) -> Iterator[tuple[str, ...]]:
    for generation in generations:
        for split, found in generation.diagnostics.items():
            scaled = found.scaled
            yield (
                *(generation.short, split, words.number(found.nll)),
                *(words.number(found.brier), words.number(found.ece)),
                words.number(scaled.temperature, ".3f") if scaled else "",
                words.number(scaled.nll) if scaled else "",
                words.number(scaled.brier) if scaled else "",
                words.number(scaled.ece) if scaled else "",
            )


def reliability_table(generations: Sequence[Generation]) -> Table:
    """Return the bins of all generations on the test split, those without images left out."""
    rows = [
        (
            f"{generation.short}, {part.low:.2f} to {part.high:.2f}",
            str(part.count),
            words.percent(part.confidence),
            words.percent(part.accuracy),
        )
        for generation in generations
        for part in generation.diagnostics["test"].reliability
        if part.count
    ]
    return Table(("generation, confidence", "images", "mean confidence", "accuracy"), tuple(rows))


def agreement_table(generations: Sequence[Generation]) -> Table:
    """Return how closely each generation follows its teacher."""
    rows = []
    for generation in generations:
        confirmed = generation.confirmation
        test = generation.diagnostics.get("test")
        result = generation.result
        mcnemar = (result.mcnemar if result else None) or (confirmed.mcnemar if confirmed else None)
        agreement = result.agreement if result else None
        rows.append(
            (
                generation.short,
                words.percent(agreement if agreement is not None or not test else test.agreement),
                words.number(test.kl if test else None),
                str(mcnemar.only_student) if mcnemar else "",
                str(mcnemar.only_teacher) if mcnemar else "",
                words.number(mcnemar.p, ".3g") if mcnemar else "",
            )
        )
    head = ("generation", "agrees on", "KL, nats", "only it is right", "only its teacher is")
    return Table((*head, "p (McNemar)"), tuple(rows)).without_empty()


def confusion_table(
    run: Run,
    pairs: Sequence[Pair],
    names: Sequence[str],
    found: Sequence[Sequence[Confusion]],
) -> Table:
    """Return a row a pair of classes, a column a model."""
    counts = [{(each.label, each.predicted): each.count for each in rows} for rows in found]
    return Table(
        ("label, taken for", *names),
        tuple((pair_name(run, pair), *(str(of.get(pair, "")) for of in counts)) for pair in pairs),
        "Empty: not among the model's most frequent confusions.",
    )


def pair_name(run: Run, pair: Pair) -> str:
    """Return a pair of classes as people read it."""
    return f"{run.class_name(pair[0])} → {run.class_name(pair[1])}"


def class_table(run: Run, generations: Sequence[Generation]) -> Table:
    """Return accuracy by class, a column a generation."""
    columns = [generation.diagnostics["test"].class_accuracy for generation in generations]
    classes = max(len(column) for column in columns)
    rows = [
        (
            run.class_name(label),
            *(words.percent(c[label] if label < len(c) else None) for c in columns),
        )
        for label in range(min(classes, MOST_ROWS))
    ]
    head = ("class", *(generation.title for generation in generations))
    return Table(head, tuple(rows), left_out(classes, "classes"))
