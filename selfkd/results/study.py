"""Settings side by side."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from selfkd.results.evaluation import Unseen
from selfkd.results.fields import Count, Digest, FileName
from selfkd.results.row import ROW, Interval, Measured
from selfkd.results.trial import Written
from selfkd.results.verdict import Verdict


@dataclass(frozen=True, kw_only=True, config=ROW)
class ArmRun(Measured):
    """A seed of an arm of a study."""

    number: Count
    seed: int
    hash: Digest = ""
    parameters: Count | None = None
    train_seconds: float = 0.0
    checkpoint: FileName | None = None
    unseen: Unseen | None = None


@dataclass(frozen=True, kw_only=True, config=ROW)
class ArmResult(Measured):
    """An arm of a study over its seeds; `metrics` are means."""

    name: str
    runs: tuple[ArmRun, ...]
    mean: Interval
    errors: Interval | None = None
    """Number of test errors."""
    written: Written | None = None
    """Text of its teachers that it was trained on, where it was."""
    agreement: Interval | None = None
    unseen_accuracy: Interval | None = None
    """Test accuracy on the classes that it was trained on no image of."""
    biased_unseen_accuracy: Interval | None = None
    """The same with one bias for these classes."""
    biased_errors: Interval | None = None
    all_biased_errors: Interval | None = None


@dataclass(frozen=True, kw_only=True, config=ROW)
class ContrastResult:
    """Two arms of a study, compared seed by seed."""

    arm: str
    to: str
    reference: str | None = None
    difference: Interval | None = None
    share: Interval | None = None
    """Fraction of the gap from `to` to the reference that is closed."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class MembersRow(Measured):
    """The teachers of a study that come from elsewhere."""

    count: Count
    parameters: float | None = None
    ms_1: float | None = None
    ms_128: float | None = None


@dataclass(frozen=True, kw_only=True, config=ROW)
class StudySummary:
    """The summary of `selfkd.study`."""

    items: Count
    seeds: Count
    arms: tuple[ArmResult, ...]
    contrasts: tuple[ContrastResult, ...] = ()
    verdict: Verdict | None = None
    """Of the contrasts, in their order; None without any."""
    members: MembersRow | None = None
    metric: str | None = None
    """Metric of a user's training function, which has a test split of its own if any."""
