"""Many teachers, one student."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass

from selfkd.results.evaluation import Diagnostics
from selfkd.results.fields import Count, Digest, FileName, Point
from selfkd.results.row import ROW, Interval, Measured, Row
from selfkd.results.trial import Model, Written
from selfkd.results.verdict import Verdict


@dataclass(frozen=True, kw_only=True, config=ROW)
class Member(Measured):
    """A teacher of an ensemble."""

    hash: Digest
    checkpoint: FileName
    model: Row = Field(default_factory=dict)
    """Name and arguments of its network."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class Members:
    """The teachers of a run, the best on validation first."""

    members: tuple[Member, ...]


@dataclass(frozen=True, kw_only=True, config=ROW)
class Parts:
    """A generalist with its specialists, as one teacher."""

    hash: Digest
    parts: tuple[str, ...] = Field(min_length=1)
    """Files of the networks, the generalist's first, relative to the file of this row."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class SourceResult:
    """What was made of the members to teach."""

    teachers: tuple[Model, ...]


@dataclass(frozen=True, kw_only=True, config=ROW)
class TableRow(Measured):
    """A model, or the mean of several, with what it costs."""

    name: str
    low: float | None = None
    high: float | None = None
    """Ends of the interval of the test metric."""
    runs: tuple[float, ...] = ()
    """Test metric of each model."""
    parameters: float | None = None
    ms_1: float | None = None
    """Milliseconds an item, of one at a time."""
    ms_128: float | None = None
    """Milliseconds an item, of 128 at a time."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class Chosen(Measured):
    """The setting that a search chose, by its metrics on validation."""

    point: Point = Field(default_factory=dict)
    temperature: float | None = None
    alpha: float | None = None
    average: str
    hash: Digest


@dataclass(frozen=True, kw_only=True, config=ROW)
class TeacherRow(Measured):
    """The ensemble that a student was distilled from."""

    source: str
    members: Count
    written: Written | None = None
    """Text of its members that students were trained on, where they were."""
    parameters: float | None = None
    ms_1: float | None = None
    ms_128: float | None = None


@dataclass(frozen=True, kw_only=True, config=ROW)
class EnsembleSummary:
    """The summary of `selfkd.ensemble`."""

    rows: tuple[TableRow, ...]
    teacher: TeacherRow
    chosen: Chosen
    trials: Count
    seeds: Count
    """Number of pairs on fresh seeds; 0 where there is only the pair that was chosen."""
    wanted: Count = 0
    """Number of fresh seeds that were to be trained, those that failed included."""
    gain: Interval | None = None
    """Paired difference of the student to the same from labels only; None without a baseline."""
    transfer_gain: Interval | None = None
    """Paired difference of the student to the same distilled without the transfer set."""
    verdict: Verdict | None = None
    """Of the student against the same from labels only, and without the transfer set; None where
    it is compared with neither."""
    share: Interval | None = None
    """Share of the teacher's gain that the student keeps."""
    diagnostics: dict[str, dict[str, Diagnostics]] = Field(default_factory=dict)
    """Of a student from `labels` and of a distilled `student`, by split."""

    @property
    def alone(self) -> bool:
        """Whether no labels-only baseline was trained to compare the student with."""
        return self.gain is None
