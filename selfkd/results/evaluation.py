"""A model on validation and test."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass

from selfkd.results.fields import Count, Digest
from selfkd.results.row import ROW, Measured, Number


@dataclass(frozen=True, kw_only=True, config=ROW)
class McNemar:
    """Test items on which just one of student and teacher is right, and the exact p-value."""

    only_student: int
    only_teacher: int
    p: float


@dataclass(frozen=True, kw_only=True, config=ROW)
class Bin:
    """A bin of a reliability diagram."""

    low: float
    high: float
    count: int
    confidence: float | None = None
    accuracy: float | None = None


@dataclass(frozen=True, kw_only=True, config=ROW)
class Confusion:
    """How often items of a class were taken for another; classes by name, or by number."""

    label: str | int
    predicted: str | int
    count: int


@dataclass(frozen=True, kw_only=True, config=ROW)
class Diagnostics(Measured):
    """Calibration of a model on a split, and its fidelity to its teacher."""

    scaled: dict[str, Number] | None = None
    """Calibration after one temperature that was fitted on validation."""
    reliability: tuple[Bin, ...] = ()
    class_accuracy: tuple[float | None, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    teacher_confusions: tuple[Confusion, ...] = ()


@dataclass(frozen=True, kw_only=True, config=ROW)
class Biases(Measured):
    """Test accuracy with one bias for each class."""

    biases: tuple[float, ...]


@dataclass(frozen=True, kw_only=True, config=ROW)
class Unseen(Measured):
    """What becomes of classes that a student was trained on no image of."""

    classes: tuple[int, ...]
    bias: float = 0.0
    """Number that is added to the logits of these classes, fitted on validation."""
    class_accuracy: tuple[float | None, ...] = ()
    biased_class_accuracy: tuple[float | None, ...] = ()
    all_biased: Biases | None = None


@dataclass(frozen=True, kw_only=True, config=ROW)
class Evaluation(Measured):
    """A model on validation and test: `metrics` are val_…, test_… and agreement."""

    hash: Digest
    parameters: Count | None = None
    mcnemar: McNemar | None = None
    unseen: Unseen | None = None
    diagnostics: dict[str, Diagnostics] = Field(default_factory=dict)
    """By split."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class Example:
    """A test item on which just one of two models is right."""

    item: Count
    label: Count
    predicted: tuple[Count, Count]
    """Class that each model predicts."""
    confidence: tuple[Number, Number]
    """Probability that each model gives to the class that it predicts."""
    picture: str = Field(default="", max_length=200_000)
    """PNG file of the item in base64."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class Examples:
    """Test items that tell two generations apart."""

    generations: tuple[Count, Count]
    """Generation 0, and the best on validation of those that were distilled."""
    hashes: tuple[Digest, Digest] = ("", "")
    """Hashes of both models."""
    counts: tuple[Count, Count] = (0, 0)
    """Number of items on which the second alone is right, and the first alone."""
    gained: tuple[Example, ...] = ()
    """Items on which the second alone is right, the largest change of the label's probability
    first."""
    lost: tuple[Example, ...] = ()
    """The same of those on which the first alone is right."""
