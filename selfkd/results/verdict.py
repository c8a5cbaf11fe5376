"""Verdict of a family of comparisons: one headline, then the members."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from selfkd.results.fields import Count
from selfkd.results.row import ROW, Interval

Outcome = Literal["better", "worse", "none"]


@dataclass(frozen=True, kw_only=True, config=ROW)
class Comparison:
    """One comparison of a family."""

    name: str
    """Name of what may be better, such as `generation 3`."""
    to: str
    """Name of what it is compared with, such as `generation 0`."""
    difference: Interval | None = None
    """Paired difference with its own interval, which is not corrected."""
    p: float | None = None
    """p-value, corrected for the whole family; None where there is no test."""
    outcome: Outcome = "none"
    """What the corrected test says at 5 %."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class Verdict:
    """What a run says of its question, at an error rate of 5 % for the whole family."""

    name: str
    """Name of what may be better, such as `generations 1 to 5, taken together`."""
    to: str
    """Name of what it is compared with, such as `generation 0`."""
    difference: Interval | None = None
    """Paired difference of the headline."""
    p: float | None = None
    """p-value of the headline; None where there is no test, as with a single seed."""
    outcome: Outcome = "none"
    seeds: Count = 0
    """Number of paired seeds."""
    covers: Literal["seeds", "lineages"] = "seeds"
    """What the intervals cover: fresh seeds with the run's own teachers, or whole lineages."""
    method: Literal["closed", "holm"] = "holm"
    """Correction over the members: the closed test, or Holm."""
    comparisons: tuple[Comparison, ...] = ()
    sentences: tuple[str, ...] = ()
    """The verdict in words, the headline first."""
