"""What a teacher's soft targets hold beside the label."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass

from selfkd.results.fields import Count, Digest
from selfkd.results.row import ROW, Number


@dataclass(frozen=True, kw_only=True, config=ROW)
class Softness:
    """How soft a teacher's targets are at a temperature, means over the training items."""

    temperature: float
    entropy: Number
    """Entropy in bits."""
    wrong_entropy: Number
    """Entropy in bits among the classes other than the label, as if these were all."""
    largest: Number
    """Largest probability."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class NearClass:
    """A wrong class with what it gets of a class's wrong probability mass.

    Classes are by name, or by number.
    """

    label: str | int
    """Class of the items."""
    other: str | int
    """Wrong class."""
    share: Number
    """Share of an item's wrong probability mass, mean over the items of the class."""
    probability: Number
    """Mean probability of the wrong class."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class SecondChoice:
    """A training item with the two classes of the largest probability, by name or by number."""

    item: Count
    label: str | int
    classes: tuple[str | int, str | int]
    probabilities: tuple[Number, Number]
    picture: str = Field(default="", max_length=200_000)
    """PNG file of the item in base64."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class Disagreement:
    """How much the members of an ensemble disagree on the training items, at T = 1."""

    pairs: Number
    """Fraction of the items on which two members predict different classes, mean over pairs."""
    information: Number
    """Bits: entropy of the mean of the members' probabilities less the mean of their entropies,
    which is the mutual information of the class and the member (Jensen-Shannon divergence)."""
    agreement: tuple[Number, ...]
    """Fraction of the items on which each member predicts what the average does."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class TeacherTargets:
    """What the soft targets of a teacher hold, from its cached logits."""

    teacher: str = "the teacher"
    """Name of the teacher."""
    students: str = ""
    """Name of what is distilled from it."""
    hashes: tuple[Digest, ...] = ()
    """Hashes of the teacher's members."""
    items: Count = 0
    """Number of training items that are measured."""
    of: Count = 0
    """Number of training items that have a label."""
    temperature: float = 1.0
    """Temperature of `shares` and `near`."""
    softness: tuple[Softness, ...] = ()
    """By temperature; none where only samples are cached."""
    near: tuple[NearClass, ...] = ()
    """Pairs of classes: the nearest wrong classes of each class, or the most confused pairs."""
    pairs: bool = False
    """Whether `near` are the most confused pairs of all, where classes are many."""
    shares: tuple[tuple[Number, ...], ...] = ()
    """Share of the wrong probability mass, a row a class, where classes are few."""
    names: tuple[str, ...] = ()
    """Names of the rows and columns of `shares`."""
    seconds: tuple[SecondChoice, ...] = ()
    """Items with the largest probability of the second choice at T = 1."""
    disagreement: Disagreement | None = None
    """Of the members of an ensemble."""
    notes: tuple[str, ...] = ()
    """What is not known, or known in part, in words."""
