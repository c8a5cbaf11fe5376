"""What a teacher's soft targets hold: nearest wrong classes, softness by T, second choices."""

from __future__ import annotations

from collections.abc import Iterator

from selfkd.reporting import words
from selfkd.reporting.figures.classes import class_shares
from selfkd.reporting.read import Run
from selfkd.reporting.sections.gallery import Gallery, Picture, encode_png
from selfkd.reporting.sections.panels import Panel, Section
from selfkd.reporting.tables import Table
from selfkd.results import Disagreement, NearClass, TeacherTargets

NEAREST = ("nearest", "second", "third")


def teacher_sections(run: Run) -> Iterator[Section]:
    """Yield what the teacher knows beside the labels, where its logits were cached."""
    found = run.teacher
    if found is None or not found.near:
        return
    yield Section(
        "What the teacher knows",
        tuple(_panels(found)),
        " ".join(f"{words.sentence(line)}" for line in describe_targets(found, run.data.unit)),
        gallery=_gallery(found),
    )


def _panels(found: TeacherTargets) -> Iterator[Panel]:
    title = "Nearest wrong classes"
    most = max(found.near, key=lambda row: row.share)
    shares = found.shares if len(found.shares) == len(found.names) > 1 else ()  # else edited
    even = f"; spread evenly it would be {1 / (len(shares) - 1):.0%}" if shares else ""
    text = (
        f"Share of the probability that is not the label's, mean over the items of a class at T "
        f"{found.temperature:g}. The largest is {_pair(most)}, {most.share:.0%}{even}."
    )
    figure = None
    if shares:
        figure = class_shares(found.names, shares, title=title)
    yield Panel(title, text, figure, nearest_table(found))
    if found.softness:
        text = (
            "Means over the items: entropy of the soft targets, entropy among the classes other "
            "than the label as if these were all, and the largest probability."
        )
        yield Panel("Softness by temperature", text, None, softness_table(found))
    if (own := found.disagreement) is not None:
        (text,) = describe_disagreement(found)
        yield Panel("Members", words.sentence(text), None, members_table(own))


def _gallery(found: TeacherTargets) -> Gallery | None:
    pictures = []
    for row in found.seconds:
        data = encode_png(row.picture) if row.picture else None
        if data is None:
            continue
        first, second = (
            f"{label} ({p:.1%})" for label, p in zip(row.classes, row.probabilities, strict=True)
        )
        pictures.append(Picture(data, str(row.label), (first, second)))
    if not pictures:
        return None
    text = "Training items on which the teacher's second choice is strongest, at T = 1."
    title = "Strongest second choices"
    return Gallery(text, ("first", "second"), ((title, tuple(pictures)),), "Training image")


def _pair(row: NearClass) -> str:
    return f"{row.label} → {row.other}"


def nearest_table(found: TeacherTargets) -> Table:
    """Return a row a class with its nearest wrong classes, or the most confused pairs."""
    if found.pairs:
        rows = tuple(
            (_pair(row), words.percent(row.share), words.number(row.probability, ".2g"))
            for row in found.near
        )
        return Table(("label → wrong class", "share of the wrong mass", "probability"), rows)
    by_class: dict[str, list[str]] = {}
    for row in found.near:
        near = f"{row.other} ({words.number(row.share, '.0%')})"
        by_class.setdefault(str(row.label), []).append(near)
    most = max(map(len, by_class.values()), default=0)
    filled = [(label, *near, *[""] * (most - len(near))) for label, near in by_class.items()]
    return Table(("class", *NEAREST[:most]), tuple(filled))


def softness_table(found: TeacherTargets) -> Table:
    """Return a row a temperature: entropies and the largest probability."""
    rows = tuple(
        (
            f"{row.temperature:g}",
            words.number(row.entropy, ".3f"),
            words.number(row.wrong_entropy, ".3f"),
            words.number(row.largest, ".3f"),
        )
        for row in found.softness
    )
    head = ("T", "entropy, bits", "among wrong classes, bits", "largest probability")
    return Table(head, rows)


def seconds_table(found: TeacherTargets) -> Table:
    """Return a row an item whose second choice is strong."""
    rows = []
    for row in found.seconds:
        (first, second), (p, q) = row.classes, row.probabilities
        choices = (f"{first} ({p:.1%})", f"{second} ({q:.1%})")
        rows.append((f"{row.item:,}", str(row.label), *choices))
    return Table(("item", "label", "first choice", "second choice"), tuple(rows))


def members_table(found: Disagreement) -> Table:
    """Return a row a member with its agreement with the average."""
    rows = tuple((str(n), words.percent(value)) for n, value in enumerate(found.agreement))
    return Table(("member", "agreement with the average"), rows)


def describe_targets(found: TeacherTargets, unit: str = "items") -> Iterator[str]:
    """Yield in sentences what was measured."""
    some = "" if found.items == found.of else f" (of {found.of:,}, evenly spaced)"
    yield (
        f"soft targets of {found.teacher}, which {found.students} "
        f"{'are' if found.students.endswith('students') else 'is'} distilled from, on "
        f"{found.items:,} training {unit}{some}"
    )
    yield from found.notes


def describe_disagreement(found: TeacherTargets) -> Iterator[str]:
    """Yield in a sentence how much the members of an ensemble disagree."""
    if (own := found.disagreement) is None:
        return
    yield (
        f"two members predict different classes on {words.percent(own.pairs)} of the items; mutual "
        f"information of class and member {words.number(own.information, '.4f')} bits"
    )
