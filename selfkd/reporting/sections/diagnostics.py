"""The figures of calibration, of agreement with the teacher, of confusions and classes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from selfkd.reporting import words
from selfkd.reporting.figures.generations import charts
from selfkd.reporting.figures.generations import generations as figures
from selfkd.reporting.figures.style import Bar, Level, Measure
from selfkd.reporting.read import Generation, Run
from selfkd.reporting.schema import Confusion
from selfkd.reporting.sections import calibration as diagnoses
from selfkd.reporting.sections.panels import Panel, Section

MOST_PAIRS, MOST_CLASSES = 10, 20


def diagnosis_sections(run: Run) -> Iterator[Section]:
    """Yield calibration, student and teacher, classes; without panels where nothing is known."""
    models = run.generations or run.students
    tested = [model for model in models if "test" in model.diagnostics]
    yield Section("Calibration", tuple(_reliability(tested)))
    agreement = _student_agreement(run) if run.students else _agreement(run)
    yield Section("Student and teacher", (*agreement, *_confusions(run, tested)))
    yield Section("Classes", tuple(_classes(run, tested)))


def _reliability(tested: Sequence[Generation]) -> Iterator[Panel]:
    binned = [g for g in tested if any(part.count for part in g.diagnostics["test"].reliability)]
    if not binned:
        return
    models = [
        (
            generation.number,
            generation.title,
            [
                (part.confidence, part.accuracy, part.count)
                for part in generation.diagnostics["test"].reliability
                if part.count and part.confidence is not None and part.accuracy is not None
            ],
        )
        for generation in binned
    ]
    errors = ", ".join(f"{g.title} {words.number(g.diagnostics['test'].ece)}" for g in binned)
    text = (
        "Below the diagonal a model is surer than right, above it less sure; the larger a dot, the "
        f"more images. ECE on test: {errors}."
    )
    yield Panel(
        "Reliability on test",
        text,
        figures.reliability(models),
        diagnoses.reliability_table(binned),
    )


def _agreement(run: Run) -> Iterator[Panel]:
    taught = [g for g in run.generations if g.result and g.result.agreement is not None]
    if not taught:
        return
    values = [(g.number, g.result.agreement) for g in taught if g.result]
    yield Panel(
        "Agreement with the teacher",
        "How often a generation names the same class as its teacher on test: "
        + ", ".join(f"generation {n} {words.percent(v)}" for n, v in values)
        + ".",
        charts.dots_per_generation(
            [(n, v) for n, v in values if v is not None], measure=Measure("agreement")
        ),
        diagnoses.agreement_table(taught),
    )


def _student_agreement(run: Run) -> Iterator[Panel]:
    """Yield how closely the student of an ensemble follows its teacher."""
    student = run.students[-1]
    test = student.diagnostics.get("test")
    if test is None or test.agreement is None:
        return
    yield Panel(
        "Agreement with the teacher",
        f"The student names the same class as its teacher on {words.percent(test.agreement)} of "
        f"the test images; KL {words.number(test.kl)} nats.",
        charts.levels([Level("agreement", Bar(test.agreement))], measure=Measure("agreement")),
        diagnoses.agreement_table([student]),
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
    total: Counter[diagnoses.Pair] = Counter()
    for rows in found_by:
        for each in rows:
            total[each.label, each.predicted] += each.count
    pairs = [pair for pair, _ in total.most_common(MOST_PAIRS)]
    table = diagnoses.confusion_table(run, pairs, names, found_by)
    counts = [[int(cell) if cell else None for cell in row[1:]] for row in table.rows]
    shared = f" Both: errors of {tested[-1].title} that its teacher makes, too."
    yield Panel(
        "Confusions on test",
        f"The {len(pairs)} pairs of classes that are most often confused; the first is "
        f"{table.rows[0][0]}.{shared if names[-1] == 'both' else ''}",
        charts.counts([row[0] for row in table.rows], names, counts),
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
        diagnoses.class_table(run, scored),
    )
