"""Students of growing size."""

from __future__ import annotations

from pydantic.dataclasses import dataclass

from selfkd.results.ensemble import TeacherRow
from selfkd.results.fields import Count, FileName, StageName
from selfkd.results.row import ROW, Interval, Measured
from selfkd.results.verdict import Verdict


@dataclass(frozen=True, kw_only=True, config=ROW)
class SearchOfSize:
    """Where the search of a student's settings lies."""

    value: int | float | str
    parameters: Count
    search: StageName


@dataclass(frozen=True, kw_only=True, config=ROW)
class SearchesOfSizes:
    """The students of a capacity curve, the smallest first."""

    key: str
    students: tuple[SearchOfSize, ...]


@dataclass(frozen=True, kw_only=True, config=ROW)
class Seeds(Measured):
    """A mean over seeds with its interval; `metrics` are means too."""

    value: float
    low: float | None = None
    high: float | None = None
    runs: tuple[float, ...] = ()

    @property
    def interval(self) -> Interval:
        """The mean as an estimate."""
        return Interval(self.value, self.low, self.high)


@dataclass(frozen=True, kw_only=True, config=ROW)
class Size:
    """A student of a capacity curve."""

    value: int | float | str
    parameters: int
    labels: Seeds
    distilled: Seeds
    difference: Interval
    room: Interval
    """How far labels only are below the teacher."""
    p: float | None = None
    p_holm: float | None = None
    verdict: str = ""
    temperature: float | None = None
    alpha: float | None = None
    trials: Count = 1
    train_seconds: float = 0.0
    ms_1: float | None = None
    ms_128: float | None = None
    checkpoint: FileName = ""
    search: FileName = ""
    """Folder of its search."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class CapacitySummary:
    """The summary of `selfkd.capacity`."""

    key: str
    seeds: Count
    searched: bool = False
    trials: Count = 0
    teacher: TeacherRow
    sizes: tuple[Size, ...]
    verdict: Verdict
    """Of the distilled students, taken together and one by one."""
    said: tuple[str, ...] = ()
    """Why distillation may not help elsewhere."""
