"""What a teacher's soft targets hold: nearest wrong classes, softness by T, second choices."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from selfkd.reporting import words
from selfkd.reporting.tables import Table
from selfkd.results import TeacherTargets

Name = Callable[[int], str]
"""Function from the number of a class to its name."""
NEAREST = ("nearest", "second", "third")


def nearest_table(found: TeacherTargets, name: Name) -> Table:
    """Return a row a class with its nearest wrong classes, or the most confused pairs.

    Args:
        found: What the soft targets hold.
        name: Name of a class.
    """
    by_class: dict[int, list[str]] = {}
    for row in found.near:
        near = f"{name(row.other)} {words.number(row.share, '.0%')}"
        by_class.setdefault(row.label, []).append(near)
    if found.pairs:
        rows = tuple(
            (
                f"{name(row.label)} → {name(row.other)}",
                words.percent(row.share),
                words.number(row.probability, ".2g"),
            )
            for row in found.near
        )
        return Table(("label → wrong class", "share of the wrong mass", "probability"), rows)
    most = max(map(len, by_class.values()), default=0)
    filled = [(name(label), *near, *[""] * (most - len(near))) for label, near in by_class.items()]
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


def seconds_table(found: TeacherTargets, name: Name) -> Table:
    """Return a row an item whose second choice is strong."""
    rows = []
    for row in found.seconds:
        (first, second), (p, q) = row.classes, row.probabilities
        choices = (f"{name(first)} {p:.1%}", f"{name(second)} {q:.1%}")
        rows.append((f"{row.item:,}", name(row.label), *choices))
    return Table(("item", "label", "first choice", "second choice"), tuple(rows))


def describe_targets(found: TeacherTargets, unit: str = "items") -> Iterator[str]:
    """Yield in sentences what was measured."""
    some = "" if found.items == found.of else f" (of {found.of:,}, evenly spaced)"
    yield (
        f"{found.teacher}, from which {found.students} is distilled, on {found.items:,} training "
        f"{unit}{some}"
    )
    yield from found.notes


def describe_disagreement(found: TeacherTargets) -> Iterator[str]:
    """Yield in a sentence how much the members of an ensemble disagree."""
    if (own := found.disagreement) is None:
        return
    agreement = ", ".join(words.percent(value) for value in own.agreement)
    yield (
        f"members: two of them predict different classes on {words.percent(own.pairs)} of the "
        f"items; mutual information {words.number(own.information, '.4f')} bits; agreement of "
        f"each with the average {agreement}"
    )
