"""Events of a run: one union, handed to one callback."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from selfkd.results.capacity import CapacitySummary
from selfkd.results.deploy import DeploySummary
from selfkd.results.ensemble import EnsembleSummary
from selfkd.results.generations import Confirmation, GenerationResult, GenerationsSummary
from selfkd.results.study import StudySummary
from selfkd.results.trial import Epoch, Trial, TrialResult

Summary = GenerationsSummary | EnsembleSummary | CapacitySummary | StudySummary | DeploySummary


@dataclass(frozen=True)
class TaskStarted:
    """Something is done in so many parts, such as caching teacher logits."""

    title: str
    parts: int


@dataclass(frozen=True)
class TaskProgressed:
    """A part is done; `state`, of cached logits, is kept, written or remade."""

    state: str | None = None


@dataclass(frozen=True)
class StageStarted:
    """A stage of so many trials begins, some of them done before a resume."""

    title: str
    trials: int
    done: int


@dataclass(frozen=True)
class TrialProgressed:
    """A running trial has new epochs."""

    trial: Trial
    epochs: tuple[Epoch, ...]


@dataclass(frozen=True)
class TrialFinished:
    """A trial has its result."""

    trial: TrialResult


@dataclass(frozen=True)
class GenerationFinished:
    """A generation has been chosen and measured; those done before a resume come again."""

    result: GenerationResult


@dataclass(frozen=True)
class GenerationConfirmed:
    """A generation has been replicated; those done before a resume come again."""

    confirmation: Confirmation


@dataclass(frozen=True)
class RunFinished:
    """The summary of a run is written."""

    summary: Summary


@dataclass(frozen=True)
class Message:
    """Something that a user should know."""

    text: str


Event = (
    TaskStarted
    | TaskProgressed
    | StageStarted
    | TrialProgressed
    | TrialFinished
    | GenerationFinished
    | GenerationConfirmed
    | RunFinished
    | Message
)
Events = Callable[[Event], None]
"""Callback for the events of a run."""
