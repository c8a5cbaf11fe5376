"""What a worker reads from the cached logits of a teacher: what its soft targets hold."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from selfkd.analysis.soft_targets import MOST_VALUES, TEMPERATURES, measure_targets
from selfkd.config import Tree
from selfkd.results import Row, TeacherTargets, to_row
from selfkd.soft_targets.store import open_store
from selfkd.storage.remote import as_path
from selfkd.tasks import make_task
from selfkd.tasks.task import Task
from selfkd.worker.evaluate import weights_of

REPORTED_VALUES = 2**21
"""Logits that are read for the report, in less than a second."""


def read_targets(
    task: Task,
    targets: str,
    teachers: Sequence[Mapping[str, Any]],
    *,
    temperatures: Sequence[float] = TEMPERATURES,
    temperature: float = 1.0,
    most_values: int = MOST_VALUES,
) -> TeacherTargets:
    """Return what the cached logits of a teacher hold beside the labels, in the first view.

    Args:
        task: Task of the students.
        targets: Folder of the cached teacher logits.
        teachers: `hash`, perhaps `weight`, of each teacher whose average it is.
        temperatures: Temperatures T of the softness.
        temperature: Temperature of the similarities of classes.
        most_values: Number of logits that are read, of all members; of more items evenly spaced
            ones are.

    Raises:
        FileNotFoundError: The logits are not cached, or not any more.
        ValueError: What is cached is damaged, or no item has one label.
    """
    hashes = [teacher["hash"] for teacher in teachers]
    manifest, distill = task.manifest(hashes[0], {}), task.config.distill
    stored = open_store(as_path(targets), hashes, data=manifest.data)
    labels = task.cached_labels()
    mixed = int((labels < 0).sum()) if task.config.data.augment.mixes else 0
    if mixed == len(labels):
        raise ValueError(
            f"all {mixed:,} training images are mixed with another in their first view, which has "
            "not one label"
        )
    found = measure_targets(
        lambda items: stored(items, 0),
        labels,
        classes=stored.classes,
        temperatures=temperatures,
        temperature=temperature,
        average=distill.average,
        weights=weights_of(teachers),
        most_values=most_values // stored.members,
    )
    notes = found.notes
    if mixed:
        notes += (
            f"{mixed:,} of {len(labels):,} training images are left out, as their first view is "
            "mixed with another image",
        )
    return replace(_named(found, task), hashes=tuple(hashes), notes=notes)


def _named(found: TeacherTargets, task: Task) -> TeacherTargets:
    """Return the same with the names of classes, or tokens as text."""

    def name(output: str | int) -> str:
        return output if isinstance(output, str) else task.output_names([output])[0]

    near = [replace(row, label=name(row.label), other=name(row.other)) for row in found.near]
    seconds = [
        replace(row, label=name(row.label), classes=(name(row.classes[0]), name(row.classes[1])))
        for row in found.seconds
    ]
    names = tuple(map(name, range(len(found.shares))))
    return replace(found, near=tuple(near), seconds=tuple(seconds), names=names)


def teacher_targets(
    config: Tree, targets: str, teachers: Sequence[Mapping[str, Any]]
) -> Iterator[Row]:
    """Read what the soft targets of a teacher hold, with pictures where items are images.

    Args:
        config: Config of the students.
        targets: Folder of the cached teacher logits.
        teachers: `hash`, perhaps `weight`, of each teacher whose average it is.

    Yields:
        A row of `TeacherTargets`.
    """
    task = make_task(config)
    found = read_targets(task, targets, teachers, most_values=REPORTED_VALUES)
    pictures = task.pictures("train", [row.item for row in found.seconds])
    shown = [
        replace(row, picture=base64.b64encode(picture).decode())
        for row, picture in zip(found.seconds, pictures, strict=False)
    ]
    shown = shown or list(found.seconds)
    yield to_row(replace(found, seconds=tuple(shown)))


JOBS: dict[str, Callable[..., Iterator[Row]]] = {"teacher_targets": teacher_targets}
