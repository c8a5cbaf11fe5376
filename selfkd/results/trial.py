"""Data, models and trials."""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from selfkd.results.row import ROW, Measured, Point


@dataclass(frozen=True, config=ROW)
class Model:
    """A trained model."""

    hash: str
    checkpoint: str
    """Its file, relative to the run folder."""
    weight: float | None = None
    """Weight in the average of an ensemble; all alike when none has one."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class Facts:
    """What a task says of its data and of the networks of a config."""

    items: dict[str, int] = Field(default_factory=dict)
    """Sizes of the splits train, val and test; none of a user's training function."""
    unit: str = "images"
    """Word for the items."""
    metric: str = "accuracy"
    """Metric that models are compared by, measured as val_<metric> and test_<metric>."""
    mode: Literal["max", "min"] = "max"
    """Whether more of it is better, or less."""
    outputs: int = 0
    """Number of classes, or size of the vocabulary."""
    names: tuple[str, ...] = ()
    """Names of the outputs, where they have any."""
    views: int = 1
    """Views of each training item whose teacher logits are cached."""
    parameters: dict[str, int] = Field(default_factory=dict)
    """Sizes of the networks: `model` and `student`."""
    fingerprints: dict[str, str] = Field(default_factory=dict)
    """Hashes of the splits."""
    function: str | None = None
    """Reference of a user's training function, which has data of its own."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class Epoch(Measured):
    """A row of a learning curve."""

    epoch: int
    seconds: float = 0.0
    """Time since the trial began."""
    hash: str | None = None
    """Hash of the model that was saved at its end."""
    checkpoint: str | None = None
    """Name of that model's file."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class Trial:
    """A training run that has begun."""

    stage: str
    trial: int
    """Number of the trial within its stage."""
    seed: int
    point: Point = Field(default_factory=dict)
    """Settings in which the trial differs from the config."""
    teachers: tuple[str, ...] = ()
    """Hashes of its teachers."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class TrialResult(Trial, Measured):
    """A training run that has ended; `metrics` are those of its last epoch."""

    status: Literal["completed", "stopped", "failed"]
    error: str | None = None
    hash: str = ""
    """Hash of the student."""
    train_seconds: float = 0.0
    history: tuple[Epoch, ...] = ()
