"""What a teacher's soft targets hold, on the terminal."""

from __future__ import annotations

from rich.console import Console

from selfkd.cli.terminal import print_lines, print_sentences, print_table
from selfkd.reporting.sections.teacher import (
    describe_disagreement,
    describe_targets,
    members_table,
    nearest_table,
    seconds_table,
    softness_table,
)
from selfkd.results import TeacherTargets


def print_targets(console: Console, found: TeacherTargets) -> None:
    """Print what the soft targets of a teacher hold.

    Args:
        console: Console to print to.
        found: What they hold.
    """
    print_sentences(console, list(describe_targets(found)))
    print_lines(
        console, ["", f"nearest wrong classes, share of the wrong mass at T {found.temperature:g}"]
    )
    print_table(console, nearest_table(found))
    if found.softness:
        print_lines(console, ["softness by T, means over the items"])
        print_table(console, softness_table(found))
    if found.seconds:
        print_lines(console, ["strongest second choices at T 1"])
        print_table(console, seconds_table(found))
    if found.disagreement is not None:
        print_sentences(console, list(describe_disagreement(found)))
        print_table(console, members_table(found.disagreement))
