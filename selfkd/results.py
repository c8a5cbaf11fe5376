"""What a run folder's files say, checked: extra keys are kept, absent ones are None."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

Row = dict[str, Any]
CHECKPOINT = "checkpoint.pt"  # in the folder of a trial that is not done
OWN = ("epoch", "seconds", "hash", "checkpoint", "note")  # of a trial's row; all else is a metric


class Part(BaseModel):
    """A part of a file."""

    model_config = ConfigDict(extra="allow", frozen=True)

    def value(self, name: str) -> float | None:
        """Return a number by its name, also one that a training function of the user's reports."""
        found = getattr(self, name, None)
        if isinstance(found, bool) or not isinstance(found, int | float):
            return None
        return float(found)


class Estimate(Part):
    """A value with its 95 % interval; no ends where there is none."""

    value_: float = Field(alias="value")
    low: float | None = None
    high: float | None = None


class Bin(Part):
    """A bin of a reliability diagram."""

    low: float
    high: float
    count: int
    confidence: float | None = None
    accuracy: float | None = None


class Confusion(Part):
    """How often images of a class were taken for another; classes by name, or by number."""

    label: str | int
    predicted: str | int
    count: int


class Scaled(Part):
    """Calibration after one temperature, fitted on validation."""

    temperature: float | None = None
    nll: float | None = None
    brier: float | None = None
    ece: float | None = None


class Diagnostics(Part):
    """Calibration of a model on a split, and how it follows its teacher."""

    accuracy: float | None = None
    nll: float | None = None
    brier: float | None = None
    ece: float | None = None
    scaled: Scaled | None = None
    reliability: tuple[Bin, ...] = ()
    class_accuracy: tuple[float | None, ...] = ()
    confusions: tuple[Confusion, ...] = ()
    teacher_confusions: tuple[Confusion, ...] = ()
    agreement: float | None = None
    kl: float | None = None


class McNemar(Part):
    """Test images on which just one of student and teacher is right."""

    only_student: int
    only_teacher: int
    p: float


class Confirmation(Part):
    """A generation's setting, trained again on fresh seeds."""

    seeds: tuple[int, ...] | int
    """The seeds, or only how many there were."""
    test_accuracy: tuple[float, ...] = ()
    metric: str = "test_accuracy"
    """What a training function of the user's own is measured by, else test accuracy."""
    mean: Estimate
    first: Estimate | None = None
    previous: Estimate | None = None
    mcnemar: McNemar | None = None
    verdict: str | None = None

    @property
    def count(self) -> int:
        """How many seeds there were."""
        return self.seeds if isinstance(self.seeds, int) else len(self.seeds)


class Control(Part):
    """What else of equal cost gives."""

    name: str
    title: str | None = None
    test_accuracy: Any = None
    mean: Estimate
    first: Estimate | None = None
    verdict: str | None = None


class Epoch(Part):
    """A row of a learning curve."""

    epoch: int


class Trial(Part):
    """One training run."""

    stage: str = ""
    trial: int
    status: str
    point: dict[str, Any] = Field(default_factory=dict)
    error: str | None = None
    hash: str = ""
    val_accuracy: float | None = None
    val_nll: float | None = None
    train_seconds: float = 0.0
    history: tuple[Epoch, ...] = ()


class Model(Part):
    """A model by its hash."""

    hash: str


class Result(Part):
    """A finished generation."""

    generation: int
    trial: int
    point: dict[str, Any] = Field(default_factory=dict)
    temperature: float | None = None
    alpha: float | None = None
    val_accuracy: float | None = None
    val_nll: float | None = None
    test_accuracy: float | None = None
    test_nll: float | None = None
    test_ece: float | None = None
    agreement: float | None = None
    parameters: int | None = None
    hash: str = ""
    teachers: tuple[Model, ...] = ()
    models: tuple[Model, ...] = ()
    history: tuple[Epoch, ...] = ()
    trials: int = 0
    failed: int = 0
    train_seconds: float = 0.0
    seconds: float = 0.0
    mcnemar: McNemar | None = None


class Measured(Part):
    """A model, or the mean of several, on validation and test."""

    name: str = "ensemble"
    val_accuracy: float | None = None
    test_accuracy: float | None = None
    test_nll: float | None = None
    test_ece: float | None = None
    low: float | None = None
    high: float | None = None
    runs: tuple[float, ...] = ()
    parameters: float | None = None
    ms_1: float | None = None
    ms_128: float | None = None


class Chosen(Part):
    """The setting of the student that an ensemble taught."""

    temperature: float | None = None
    alpha: float | None = None
    average: str | None = None
    val_accuracy: float | None = None
    hash: str = ""


class Compression(Part):
    """The summary of `python -m selfkd.ensemble`."""

    rows: tuple[Measured, ...]
    chosen: Chosen
    trials: int
    seeds: int
    gain: Estimate
    share: Estimate | None = None


class Seeds(Estimate):
    """A mean over seeds with its interval, and what each of them reached."""

    runs: tuple[float, ...] = ()


class Size(Part):
    """A student of a capacity curve."""

    value_: int | float | str = Field(alias="value")
    parameters: float
    labels: Seeds
    taught: Seeds
    difference: Estimate
    p_holm: float | None = None
    verdict: str = ""


class Curve(Part):
    """The summary of `python -m selfkd.capacity`."""

    key: str
    seeds: int
    sizes: tuple[Size, ...]
    teacher: Measured
    verdict: str
    said: tuple[str, ...] = ()


class ArmRun(Part):
    """A seed of an arm of a study."""

    test_accuracy: float


class StudyArm(Part):
    """An arm of a study."""

    name: str
    runs: tuple[ArmRun, ...]
    mean: Estimate
    errors: Estimate
    val_accuracy: float | None = None
    agreement: Estimate | None = None
    biased_errors: Estimate | None = None
    all_biased_errors: Estimate | None = None

    @property
    def accuracies(self) -> tuple[float, ...]:
        """Accuracy on test, one a seed."""
        return tuple(run.test_accuracy for run in self.runs)


class Contrast(Part):
    """A comparison of two arms, in words."""

    verdict: str


class Teachers(Part):
    """The teachers of a study that come from elsewhere."""

    count: int
    val_accuracy: float | None = None
    test_accuracy: float | None = None
    errors: float | None = None


class Study(Part):
    """The summary of `python -m selfkd.study`."""

    arms: tuple[StudyArm, ...]
    contrasts: tuple[Contrast, ...] = ()
    members: Teachers | None = None


def plain(part: Part) -> Mapping[str, Any]:
    """Return a part as the plain data that it was read from."""
    return part.model_dump(by_alias=True)
