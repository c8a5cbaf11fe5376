"""Calibration, teacher agreement, confusions and classes: figures and tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from selfkd.reporting import words
from selfkd.reporting.figures import charts
from selfkd.reporting.read import Generation, Run
from selfkd.reporting.sections.panels import Panel, Section
from selfkd.reporting.tables import MOST_ROWS, Table, cut_note
from selfkd.results import Bin, Confusion

MOST_PAIRS, MOST_CLASSES = 10, 20


def diagnosis_sections(run: Run) -> Iterator[Section]:
    """Yield calibration, student and teacher, classes; without panels where none is known."""
    models = run.pair or run.students
    tested = [model for model in models if "test" in model.diagnostics]
    yield Section("Calibration", tuple(_reliability(run, tested)))
    agreement = _student_agreement(run) if run.students else _agreement(run)
    yield Section("Student and teacher", (*agreement, *_confusions(run, tested)))
    yield Section("Classes", tuple(_classes(run, tested)))


def _reliability(run: Run, tested: Sequence[Generation]) -> Iterator[Panel]:
    binned = [g for g in tested if any(part.count > 0 for part in _bins(g))]
    if not binned:
        return
    models = [
        (
            generation.number,
            generation.title,
            [
                (part.confidence, part.accuracy, part.count)
                for part in _bins(generation)
                if part.count > 0 and part.confidence is not None and part.accuracy is not None
            ],
        )
        for generation in binned
    ]
    errors = ", ".join(
        f"{g.title} {words.number(g.diagnostics['test'].metric('ece'))}" for g in binned
    )
    text = (
        "Below the diagonal a model is overconfident, above it underconfident; dots and bars count "
        f"the {run.data.unit}. ECE on test: {errors}."
    )
    yield Panel(
        "Reliability on test",
        text,
        charts.reliability(models, unit=run.data.unit),
        reliability_table(binned, unit=run.data.unit),
    )


def _bins(generation: Generation) -> Sequence[Bin]:
    return generation.diagnostics["test"].reliability


def _agreement(run: Run) -> Iterator[Panel]:
    distilled = [g for g in run.generations if g.result and "agreement" in g.result.metrics]
    if not distilled:
        return
    values = [(g.number, g.result.metrics["agreement"]) for g in distilled if g.result]
    yield Panel(
        "Teacher agreement",
        f"Fraction of the test {run.data.unit} on which a generation predicts what its "
        "teacher predicts: "
        + ", ".join(f"generation {n} {words.percent(v)}" for n, v in values)
        + ".",
        None,
        agreement_table(distilled),
    )


def _student_agreement(run: Run) -> Iterator[Panel]:
    """Yield the agreement of the distilled student with its teacher."""
    student = run.students[-1]
    test = student.diagnostics.get("test")
    agreement = None if test is None else test.metric("agreement")
    if test is None or agreement is None:
        return
    yield Panel(
        "Teacher agreement",
        f"The student predicts what its teacher predicts on {words.percent(agreement)} "
        f"of the test {run.data.unit}; KL {words.number(test.metric('kl'))} nats.",
        None,
        agreement_table([student]),
    )


def _confusions(run: Run, tested: Sequence[Generation]) -> Iterator[Panel]:
    columns: list[tuple[str, Sequence[Confusion]]] = []
    for generation in tested:
        found = generation.diagnostics["test"]
        if found.confusions:
            title = generation.name or f"gen. {generation.number}"
            columns.append((title, found.confusions))
    if tested and tested[-1].diagnostics["test"].teacher_confusions:
        columns.append(("both", tested[-1].diagnostics["test"].teacher_confusions))
    if not columns:
        return
    names, found_by = [name for name, _ in columns], [rows for _, rows in columns]
    total: Counter[Pair] = Counter()
    for rows in found_by:
        for each in rows:
            total[each.label, each.predicted] += each.count
    pairs = [pair for pair, _ in total.most_common(MOST_PAIRS)]
    table = confusion_table(run, pairs, names, found_by)
    shared = f" Both: errors of {tested[-1].title} that its teacher makes as well."
    yield Panel(
        "Confusions on test",
        f"The {len(pairs)} pairs of classes that are most often confused; the first is "
        f"{table.rows[0][0]}.{shared if names[-1] == 'both' else ''}",
        None,
        table,
    )


def _classes(run: Run, tested: Sequence[Generation]) -> Iterator[Panel]:
    scored = [g for g in tested if g.diagnostics["test"].class_accuracy]
    if not scored:
        return
    last = scored[-1].diagnostics["test"].class_accuracy
    known = [label for label, value in enumerate(last) if value is not None]
    hardest = sorted(known, key=lambda label: (last[label] or 0.0, label))[:MOST_CLASSES]
    shown = sorted(hardest)
    models = [
        (
            g.number,
            g.title,
            [c[label] if label < len(c) else None for label in shown],
        )
        for g in scored
        for c in [g.diagnostics["test"].class_accuracy]
    ]
    some = f"the {len(shown)} hardest of {len(last)} classes" if len(shown) < len(last) else "class"
    if not hardest:
        return
    yield Panel(
        "Accuracy by class",
        f"Accuracy on test of {'each ' if some == 'class' else ''}{some}; the hardest for "
        f"{scored[-1].title} is {run.class_name(hardest[0])}, "
        f"{words.percent(last[hardest[0]])}.",
        charts.class_accuracy([run.class_name(label) for label in shown], models),
        class_table(run, scored),
    )


Pair = tuple[int | str, int | str]


def calibration_table(generations: Sequence[Generation]) -> Table:
    """Return calibration on validation and test, without and with the fitted temperature."""
    head: tuple[str, ...] = ("generation", "split", "NLL", "Brier", "ECE", "best T")
    head += ("NLL at best T", "Brier at best T", "ECE at best T")
    return Table(head, tuple(_calibrations(generations))).without_empty()


def _calibrations(generations: Sequence[Generation]) -> Iterator[tuple[str, ...]]:
    for generation in generations:
        for split, found in generation.diagnostics.items():
            scaled = found.scaled or {}
            yield (
                *(generation.short, split),
                *(words.number(found.metric(name)) for name in ("nll", "brier", "ece")),
                words.number(scaled.get("temperature"), ".3f"),
                *(words.number(scaled.get(name)) for name in ("nll", "brier", "ece")),
            )


def reliability_table(generations: Sequence[Generation], *, unit: str = "images") -> Table:
    """Return the bins of all generations on the test split that are not empty."""
    rows = [
        (
            f"{generation.short}, {part.low:.2f} to {part.high:.2f}",
            str(part.count),
            words.percent(part.confidence),
            words.percent(part.accuracy),
        )
        for generation in generations
        for part in _bins(generation)
        if part.count > 0
    ]
    return Table(("generation, confidence", unit, "mean confidence", "accuracy"), tuple(rows))


def agreement_table(generations: Sequence[Generation]) -> Table:
    """Return the fidelity of each generation to its teacher."""
    rows = []
    for generation in generations:
        confirmed = generation.confirmation
        test = generation.diagnostics.get("test")
        result = generation.result
        mcnemar = (result.mcnemar if result else None) or (confirmed.mcnemar if confirmed else None)
        agreement = result.metric("agreement") if result else None
        if agreement is None and test is not None:
            agreement = test.metric("agreement")
        rows.append(
            (
                generation.short,
                words.percent(agreement),
                words.number(test.metric("kl") if test else None),
                str(mcnemar.only_student) if mcnemar else "",
                str(mcnemar.only_teacher) if mcnemar else "",
                words.number(mcnemar.p, ".3g") if mcnemar else "",
            )
        )
    head = ("generation", "agreement", "KL, nats", "only it is right", "only teacher is right")
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
        ("label → predicted", *names),
        tuple((pair_name(run, pair), *(str(of.get(pair, "")) for of in counts)) for pair in pairs),
        "Empty: not among the model's most frequent confusions.",
    )


def pair_name(run: Run, pair: Pair) -> str:
    """Return the names of a class and of what is predicted in its place."""
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
    return Table(head, tuple(rows), cut_note(classes, "classes"))
