"""Born-again generations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from selfkd.results.evaluation import Diagnostics, Evaluation, McNemar
from selfkd.results.fields import Count, Digest, FileName, Point
from selfkd.results.row import ROW, Interval, Measured
from selfkd.results.trial import Epoch, Model, Written
from selfkd.results.verdict import Verdict


@dataclass(frozen=True, kw_only=True, config=ROW)
class Replicated:
    """A setting that was trained again on fresh seeds: nobody chose among these models."""

    seeds: tuple[int, ...]
    metric: str
    """Metric that is reported: of the test split, or that of a user's training function."""
    values: tuple[float, ...]
    """Metric of each seed."""
    validation: tuple[float, ...] = ()
    """What is chosen by (`search.metric`) of each seed."""
    mean: Interval
    wanted: Count = 0
    """Number of seeds that it was to be trained on, those that failed included."""
    given: bool = False
    """Whether it is one model that was given: nothing is known of other seeds, its only one has no
    meaning, and differences to it are those of the other arm's seeds to this one model."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class Confirmation(Replicated):
    """The setting of a generation, replicated."""

    generation: Count
    first: Interval | None = None
    """Paired difference to generation 0."""
    previous: Interval | None = None
    """Paired difference to the generation before."""
    mcnemar: McNemar | None = None
    """Of the chosen model and its teacher."""
    alone: bool = False
    """Whether no labels-only baseline was trained to compare it with."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class ControlResult(Replicated):
    """What else of equal cost gives."""

    name: str
    title: str
    first: Interval | None = None
    """Difference to generation 0."""
    born_again: Interval | None = None
    """Difference of generation 1 to it; of the ensemble of generations to that of seeds."""
    models: Count = 0
    """Number of generations that an ensemble of seeds stands beside."""
    point: Point = Field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=ROW)
class Origin:
    """Where a generation 0 comes from that was given."""

    name: str
    """Name of its file, or of the model of a run."""
    digest: Digest
    """Hash of that file when the run began."""
    unknown: str | None = None
    """Why its training cannot be repeated, so that it has one seed; None where it is repeated."""
    other_data: bool = False
    """Whether it may have been trained on other data than this run's training split."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class GenerationResult(Measured):
    """A finished generation: its chosen trial, measured."""

    generation: Count
    trial: Count
    point: Point = Field(default_factory=dict)
    temperature: float | None = None
    alpha: float | None = None
    hash: Digest = ""
    teachers: tuple[Model, ...] = ()
    models: tuple[Model, ...] = ()
    """Models that can teach, the chosen one first."""
    wanted_models: Count = 1
    parameters: Count | None = None
    predictions: FileName | None = None
    """File of the chosen model's logits, relative to the run folder."""
    mcnemar: McNemar | None = None
    diagnostics: dict[str, Diagnostics] = Field(default_factory=dict)
    """By split."""
    history: tuple[Epoch, ...] = ()
    trials: Count = 0
    failed: Count = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    written: Written | None = None
    """Text of its teachers that its students were trained on, where they were."""
    origin: Origin | None = None
    """Where it comes from, if it was not trained by this run."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class GenerationsSummary:
    """The summary of `selfkd.generations`."""

    generations: tuple[GenerationResult, ...]
    best: Count | None = None
    """Number of the generation whose model is taken, the best on validation."""
    confirmations: tuple[Confirmation, ...] = ()
    verdict: Verdict | None = None
    """Of the born-again generations against generation 0, or the student's network from labels."""
    ensemble: Evaluation | None = None
    """Of all generations."""
    controls: tuple[ControlResult, ...] = ()
    against_controls: Verdict | None = None
    """Of generation 1, and of the ensemble of generations, beside the controls of equal cost."""
    stopped: str | None = None
    """Why `rounds: auto` ended."""

    @property
    def alone(self) -> bool:
        """Whether generations were replicated with no labels-only baseline to compare with."""
        return any(row.alone for row in self.confirmations)


def best_generation(
    results: Sequence[GenerationResult],
    confirmations: Sequence[Confirmation] = (),
    *,
    metric: str,
    mode: Literal["max", "min"],
) -> GenerationResult:
    """Return the generation whose model is taken, by validation, never by the test split.

    Where all generations were replicated on fresh seeds, their means over those are compared, else
    their chosen trials; of equal ones the earlier is taken.

    Args:
        results: Finished generations, in order, at least one.
        confirmations: Confirmations of the same, as far as there are any.
        metric: Metric that is chosen by, `search.metric`.
        mode: Whether more of it is better, or less.
    """
    values = [result.metrics.get(metric, math.nan) for result in results]
    replicated = {row.generation: row.validation for row in confirmations}
    means = [replicated.get(result.generation) for result in results]
    if all(means):
        values = [sum(row) / len(row) for row in means if row]
    ranks = [-math.inf if math.isnan(v) else v if mode == "max" else -v for v in values]
    return results[ranks.index(max(ranks))]
