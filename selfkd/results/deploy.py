"""What is deployed: a table of files, sizes, times and scores measured on one machine."""

from __future__ import annotations

from pydantic import Field
from pydantic.dataclasses import dataclass

from selfkd.results.evaluation import McNemar
from selfkd.results.fields import Count, Digest, FileName, Point
from selfkd.results.row import ROW, Interval, Measured, Row

DEPLOYED = "deploy/deploy.json"
"""File of the summary of a deployment, in the run folder."""
WRITTEN_BITS = (4, 2)
"""Bits of weights that onnxruntime has operators for: fewer or others have no file."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class Timing:
    """Time of one prediction of a batch, on one thread."""

    items: Count
    """Number of inputs of the batch."""
    ms: float
    """Median in milliseconds, of the whole batch."""
    speed_up: Interval | None = None
    """How many times as fast as the float file of the served model, measured side by side; None
    of that file itself."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class ServedFile:
    """File that a step of a deployment wrote."""

    bytes: Count
    sha256: Digest
    """Hash of its content."""
    model: Row = Field(default_factory=dict)
    """Name and arguments of its network; empty where only the graph has it."""
    parameters: Count | None = None
    operators: dict[str, Count] = Field(default_factory=dict)
    """Number of its operators of each kind that compute in low precision."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class CompressedModel:
    """Model that a step of a deployment pruned or rounded, to be fine-tuned."""

    hash: Digest
    model: Row = Field(default_factory=dict)
    """Name and arguments of its network, where they are others than before."""
    remarks: tuple[str, ...] = ()
    """What was rounded or left whole, in words."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class FormMeasures(Measured):
    """Metrics of a form on validation and test, and its test predictions beside the float model's.

    Only the float model itself has nothing beside it.
    """

    agreement: float | None = None
    mcnemar: McNemar | None = None
    difference: Interval | None = None


@dataclass(frozen=True, kw_only=True, config=ROW)
class FormTimings:
    """Times of all forms, measured side by side on one machine."""

    timings: dict[str, tuple[Timing, ...]]
    """Times of each form, by its key."""
    cpu: str
    versions: dict[str, str]


@dataclass(frozen=True, kw_only=True, config=ROW)
class DeployRow(Measured):
    """One form of the model: its metrics on validation and test, its file and its times."""

    key: str
    """Name in plain data, such as `torch`, `float`, `int8`, `pruned_distilled` or `ensemble`."""
    title: str
    """Name in words."""
    hash: Digest = ""
    """Hash of the weights that it was made of."""
    parameters: Count | None = None
    agreement: float | None = None
    """Share of the test items on which it predicts the same as the float model."""
    bytes: Count | None = None
    """Size of its file; None where it has none."""
    file: FileName | None = None
    """Its file, relative to the run folder."""
    timings: tuple[Timing, ...] = ()
    tokens_a_second: float | None = None
    """Of a language model, at the largest batch that was timed."""
    mcnemar: McNemar | None = None
    """Its errors on the test split against those of the float model."""
    difference: Interval | None = None
    """Difference of its test metric to the float model's, over test items; of fine-tuned models,
    over seeds."""
    seeds: tuple[int, ...] = ()
    """Seeds that it was trained on, where it was."""
    values: tuple[float, ...] = ()
    """Test metric of each of these seeds."""
    operators: dict[str, Count] = Field(default_factory=dict)
    """Number of its operators of each kind that compute in low precision."""
    remarks: tuple[str, ...] = ()
    """What a reader must know of it: that it is not smaller, not faster, not written."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class DeploySummary:
    """The summary of `selfkd.deploy`, in `deploy/deploy.json`."""

    model: Digest
    """Hash of the model that is deployed, as it was chosen."""
    title: str
    """Its name within the run, such as `generation 3`."""
    network: Row = Field(default_factory=dict)
    """Name and arguments of the network that is served; empty where only the graph has it."""
    metric: str
    """Metric that models are compared by, without its split."""
    options: Row = Field(default_factory=dict)
    """`deploy` section of the config that it was made with."""
    made_of: Digest = ""
    """Hash of all that it was made of: models, options, data, versions and processor."""
    rows: tuple[DeployRow, ...]
    served: str
    """Key of the row that is served."""
    files: dict[str, FileName] = Field(default_factory=dict)
    """Files to take, by name: `float.onnx`, `int8.onnx`, `predict.py`, …"""
    drop: float | None = None
    """Points of validation accuracy (or nats) that what is served is worse than the float model."""
    exceeded: bool = False
    """Whether that is more than `deploy.max_drop`, so that there is no int8 file."""
    point: Point = Field(default_factory=dict)
    """Settings of the fine-tuning in which it differs from the config."""
    cpu: str = ""
    """Name of the processor and its instruction sets that matter for int8."""
    versions: dict[str, str] = Field(default_factory=dict)
    """Versions of torch, onnx, onnxruntime and, where it pruned, torch-pruning."""
    remarks: tuple[str, ...] = ()
    """What was rounded, left out or refused on the way, in words."""
    sentences: tuple[str, ...] = ()
    """The verdict in words, the headline first."""

    def row(self, key: str) -> DeployRow:
        """Return the row of a key.

        Raises:
            KeyError: There is none.
        """
        return {row.key: row for row in self.rows}[key]
