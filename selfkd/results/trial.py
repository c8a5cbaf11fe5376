"""Data, models and trials."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from selfkd.results.fields import Count, Digest, FileName, Point, StageName
from selfkd.results.row import OWN, ROW, Measured


@dataclass(frozen=True, config=ROW)
class Model:
    """A trained model."""

    hash: Digest
    checkpoint: FileName
    """Its file, relative to the run folder."""
    weight: float | None = None
    """Weight in the average of an ensemble; all alike when none has one."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class Written:
    """Texts that teachers have written for their students.

    >>> Written(texts=2, cut=1, right=1) + Written(texts=3)
    Written(texts=5, cut=1, right=None)
    """

    texts: Count = 0
    cut: Count = 0
    """Number of those that did not end within the context, where they are to end."""
    right: Count | None = None
    """Number of those that end in the right completion; None where there is none to compare."""

    def __add__(self, other: Written) -> Written:
        known = self.right is not None and other.right is not None
        right = (self.right or 0) + (other.right or 0) if known else None
        return Written(texts=self.texts + other.texts, cut=self.cut + other.cut, right=right)


@dataclass(frozen=True, kw_only=True, config=ROW)
class CachedFormat:
    """How the logits of a teacher are cached."""

    words: str
    """What is cached of an item in a view, in words."""
    row_bytes: Count
    """Number of its bytes."""
    shard_size: Count
    """Number of items whose logits one job caches in one file."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class Facts:
    """What a task says of its data and of the networks of a config."""

    items: dict[str, Count] = Field(default_factory=dict)
    """Sizes of the splits train, val and test; none of a user's training function."""
    transfer: Count = 0
    """Number of items of the transfer set."""
    unit: str = "images"
    """Word for the items."""
    items_an_input: Count = 1
    """Number of items that one prediction takes at once, such as the tokens of a window."""
    metric: str = "accuracy"
    """Metric that models are compared by, measured as val_<metric> and test_<metric>."""
    mode: Literal["max", "min"] = "max"
    """Whether more of it is better, or less."""
    further: tuple[str, ...] = ("nll", "ece")
    """Further metrics that tables show, measured as test_<metric>; the teacher agreement comes
    after them where it is not among them."""
    counts: dict[str, Count] = Field(default_factory=dict)
    """Number of items of val and test that `metric` is a mean over, where it is not of `items`."""
    counted: str = ""
    """Word for those items, where `unit` is not."""
    outputs: Count = 0
    """Number of classes, or size of the vocabulary."""
    names: tuple[str, ...] = ()
    """Names of the outputs, where they have any."""
    views: Count = 1
    """Views of each training item whose teacher logits are cached."""
    parameters: dict[str, Count] = Field(default_factory=dict)
    """Sizes of the networks: `model` and `student`."""
    fingerprints: dict[str, str] = Field(default_factory=dict)
    """Hashes of the splits."""
    weights: dict[str, str] = Field(default_factory=dict)
    """Hashes of the folders that networks start from, by path."""
    export: str | None = None
    """Name of the folder that a chosen model is also written to, for other programs; none when not
    given."""
    function: str | None = None
    """Reference of a user's training function, which has data of its own."""
    prompts: Count = 0
    """Number of training prompts that a teacher can go on from; 0 where it writes nothing."""
    cached: CachedFormat | None = None
    """How teacher logits are cached, where they are."""
    fixed: tuple[str, ...] = ()
    """Dotted keys that no search varies on this data, whatever its space says."""
    notes: tuple[str, ...] = ()
    """What a user should know of the data, such as files that are left out; not kept."""

    def count(self, split: str) -> int:
        """Return how many items of a split `metric` is a mean over; 0 where it is not known."""
        return self.counts.get(split, self.items.get(split, 0))

    @property
    def tested_on(self) -> str:
        """Word for the items that `metric` is a mean over."""
        return self.counted or self.unit

    @property
    def tested(self) -> str:
        """Name of the metric that models are compared by, on the test split."""
        return f"test_{self.metric}"


@dataclass(frozen=True, kw_only=True, config=ROW)
class Epoch(Measured):
    """A row of a learning curve."""

    epoch: Count
    seconds: float = 0.0
    """Time since the trial began."""
    hash: Digest | None = None
    """Hash of the model that was saved at its end."""
    checkpoint: FileName | None = None
    """Name of that model's file."""

    @classmethod
    def reported(cls, row: Mapping[str, Any]) -> Epoch:
        """Return a row that a training has reported; all its numbers but its own are metrics.

        >>> Epoch.reported({"epoch": 1, "seconds": 0.5, "format": 2.0}).metrics
        {'format': 2.0}
        """
        own = {name: row[name] for name in OWN if name in row and name != "note"}
        numbers = {k: v for k, v in row.items() if k not in OWN and isinstance(v, int | float)}
        return cls(**own, metrics=numbers)


@dataclass(frozen=True, kw_only=True, config=ROW)
class Trial:
    """A training run that has begun."""

    stage: StageName
    trial: Count
    """Number of the trial within its stage."""
    seed: int
    point: Point = Field(default_factory=dict)
    """Settings in which the trial differs from the config."""
    teachers: tuple[Digest, ...] = ()
    """Hashes of its teachers."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class TrialResult(Trial, Measured):
    """A training run that has ended; `metrics` are those of its last epoch."""

    status: Literal["completed", "stopped", "failed"]
    error: str | None = None
    hash: Digest = ""
    """Hash of the student."""
    train_seconds: float = 0.0
    history: tuple[Epoch, ...] = ()
