"""Replicas: settings on the same fresh seeds, and their differences seed by seed."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from selfkd.analysis.families import Pairs, Terms
from selfkd.analysis.statistics import paired_interval
from selfkd.analysis.verdicts import resolution
from selfkd.config import Config
from selfkd.experiments.stages import trial_seed
from selfkd.results import Facts, Interval, Mode, Replicated, find_metric, title
from selfkd.storage.files import remove_file

Key = Literal["values", "validation"]


def confirm_seeds(config: Config, count: int | None = None) -> list[int]:
    """Return the fresh seeds: those of no other trial, the same for every arm."""
    count = config.confirm.replicas if count is None else count
    return [trial_seed(config.seed, "confirm", number) for number in range(count)]


def make_terms(config: Config, metric: str, mode: Mode, facts: Facts) -> Terms:
    """Return how differences of the reported metric are judged and written."""
    replica = "fresh seed" if config.confirm.seeds else "paired seed"
    replica = "whole lineage" if config.confirm.lineages else replica
    return Terms(
        mode=mode,
        form=find_metric(metric).difference,
        unit="" if find_metric(metric).is_fraction else title(metric),
        floor=resolution(facts, metric, "test"),
        covers="lineages" if config.confirm.lineages else "seeds",
        replica=replica,
    )


def pair_up(
    name: str, to: str, measured: Replicated, other: Replicated, *, key: Key = "values"
) -> Pairs:
    """Return two arms, paired by their seeds; each seed of one with the other's given model."""
    first, second = (
        dict(zip(arm.seeds, getattr(arm, key), strict=True)) for arm in (measured, other)
    )
    if other.given:
        (value,) = second.values()
        second = dict.fromkeys(first, value)
    return Pairs.of(name, to, first, second)


def contrast(measured: Replicated, other: Replicated, *, floor: float = 0.0) -> Interval | None:
    """Return the paired difference of two arms; None where they share no seed."""
    pairs = pair_up("", "", measured, other).values.values()
    return paired_interval(*zip(*pairs, strict=True), floor=floor) if pairs else None


def remove_students(folder: Path) -> None:
    """Remove the students of an arm that has been measured; their results stay."""
    for student in folder.rglob("student.safetensors"):
        remove_file(student)
