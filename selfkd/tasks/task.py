"""The seam: what a worker needs to know of a kind of data. All above sees this and metric names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from selfkd.config import CheckpointConfig, Config, ModelConfig
from selfkd.deployment.interface import Interface
from selfkd.losses import Average
from selfkd.results import Diagnostics, Facts, Row, Unseen
from selfkd.results.fields import Digest
from selfkd.results.row import ROW
from selfkd.soft_targets.manifest import Manifest
from selfkd.training.trial import Trial

Split = Literal["train", "val", "test"]
Pool = Literal["train", "transfer"]
"""What teacher logits are cached of: the training split, or the transfer set."""
SPLITS: tuple[Split, Split] = ("val", "test")
"""What models are evaluated on."""


@dataclass(frozen=True, kw_only=True, config=ROW)
class ModelFacts:
    """Metadata of a checkpoint, by which its network is made again."""

    hash: Digest
    model: Row
    """Name and arguments of the network."""
    fingerprint: str | None = None
    """Hash of the training data, where they are known."""


class Predictor(Protocol):
    """A trained model without its data."""

    @property
    def network(self) -> nn.Module:
        """Network from inputs to logits, in eval mode."""

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the outputs, in the order of the logits."""

    def inputs(self, items: Any, *, batch_size: int, device: torch.device) -> Iterator[Tensor]:
        """Yield the network's inputs of one item or of several, made as in evaluation."""

    def example(self) -> Tensor:
        """Return inputs of one prediction, of zeros, to count its operations with."""


class Task(Protocol):
    """A kind of data: its splits, its models, how they are trained and what is measured."""

    config: Config
    device: str
    fingerprint: str
    """Hash of the training data."""
    evaluated: tuple[Split, ...]
    """What every model is evaluated on: test, and validation where something is fitted on it."""

    # --- data and models ---

    def check(self, teachers: Sequence[Mapping[str, Any]] = ()) -> Facts:
        """Try the config's networks on the data; return the facts of both.

        Args:
            teachers: `name` and `args`, or `checkpoint`, of networks that may teach the student,
                with each of which the further terms of the loss are tried.

        Raises:
            ValueError: They do not fit; says what must be otherwise.
        """

    def make(self, model: ModelConfig) -> nn.Module:
        """Return a fresh network for this data."""

    def save(
        self, path: Path, network: nn.Module, model: ModelConfig, more: Mapping[str, Any]
    ) -> str:
        """Save a network with what it is loaded by; return its hash."""

    def load(self, checkpoint: str) -> tuple[nn.Module, ModelFacts]:
        """Return the network of a checkpoint, and its metadata.

        Raises:
            ValueError: It is of other data, or of no network that can be made.
        """

    def export(self, checkpoint: str, folder: Path, card: str) -> None:
        """Write a model for other programs, in the form that `Facts.export` names.

        Args:
            checkpoint: File of the model.
            folder: Folder to write, whose parent exists; a README.md says that it is whole.
            card: Text of its card, as Markdown.
        """

    def import_weights(self, source: CheckpointConfig, save: Path) -> str | None:
        """Save the network of a file from elsewhere as a checkpoint; return what is to be said.

        Raises:
            ValueError: It is none for this data.
        """

    def digest(self, checkpoint: str) -> str:
        """Return the hash that a checkpoint's logits are cached under."""

    def networks(self, checkpoint: str) -> Iterator[nn.Module]:
        """Yield the networks that one prediction of a checkpoint takes."""

    def refresh(self, network: nn.Module) -> None:
        """Make the statistics of a network's layers those of its weights, as after averaging."""

    def example(self, items: int) -> Any:
        """Return inputs of so many items, to be timed with."""

    # --- training and predicting ---

    def train(self, trial: Trial, **options: Any) -> Iterator[Row]:
        """Train one student; yield a row an epoch."""

    def predict(self, checkpoint: str, split: Split) -> Tensor:
        """Return the logits of a checkpoint.

        Args:
            checkpoint: File of the model.
            split: Split that is predicted.
        """

    def predict_batches(
        self, checkpoint: str, items: range, *, view: int, of: Pool = "train"
    ) -> Iterator[Tensor]:
        """Yield the logits of a checkpoint for items, batch by batch, to be cached.

        Args:
            checkpoint: File of the model.
            items: Items of the training split, or of the transfer set.
            view: Number of their view.
            of: Which of them they are of.
        """

    def predict_with(self, network: nn.Module, split: Split, *, like: str | None = None) -> Tensor:
        """Return the logits of a network that was made for this data.

        Args:
            network: Network from inputs to logits.
            split: Split that is predicted.
            like: Checkpoint whose normalisation and order of outputs the network has, as an
                exported one does; those of this data when not given.
        """

    def manifest(self, teacher: str, origin: Mapping[str, Any], *, of: Pool = "train") -> Manifest:
        """Return the manifest of a teacher's cached logits of training, or of the transfer set."""

    def write(self, checkpoint: str, root: Path, *, shard: int, run: Path) -> Row:
        """Write text by a teacher on the training prompts of a shard, unless it is there.

        Args:
            checkpoint: File of the teacher.
            root: Folder of all that teachers write.
            shard: Number of the shard.
            run: Run folder that uses it.

        Returns:
            `state` (kept, written, or remade where what was there was damaged), and the numbers of
            `selfkd.results.Written`.

        Raises:
            ValueError: Models of this task write nothing.
        """

    # --- deployment ---

    def interface(self) -> Interface:
        """Return what a network of this data takes and gives when it is exported."""

    def combined(
        self,
        checkpoints: Sequence[str],
        *,
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
    ) -> nn.Module:
        """Return what is exported: the network of a checkpoint, or the average of several as one.

        Args:
            checkpoints: File of each; inputs and outputs are like those of the first.
            average: What of several is averaged.
            weights: Weight of each; all alike when not given.

        Raises:
            ValueError: One is not a single network, such as a generalist with its specialists.
        """

    def inputs(self, split: Split, most: int, *, like: str | None = None) -> Tensor:
        """Return inputs of evenly spaced items of a split, without augmentation.

        Args:
            split: Split that they are of.
            most: Largest number of inputs.
            like: Checkpoint whose normalisation they have; that of this data when not given.
        """

    def calibration(self, most: int, *, like: str | None = None) -> Tensor | None:
        """Return training inputs on which ranges of activations are measured, of all outputs.

        Args:
            most: Largest number of inputs.
            like: Checkpoint whose normalisation they have; that of this data when not given.

        Returns:
            The inputs; None where ranges are measured at each prediction.

        Raises:
            ValueError: They are too few, or an output has none.
        """

    # --- evaluation ---

    def labels(self, split: Split) -> Tensor:
        """Return a split's labels, on the CPU."""

    def evaluate(
        self,
        logits: Mapping[Split, Tensor],
        networks: Iterable[nn.Module] = (),
        *,
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
    ) -> dict[str, float]:
        """Return metrics of predictions, named val_… and test_…; of those that are there.

        The metric that models are compared by, `Facts.metric`, is the first of each split.

        Args:
            logits: Logits of each split.
            networks: Networks whose average predicted them, for metrics of what they generate.
            average: Average of the networks.
            weights: Weight of each network; all alike when not given.
        """

    def fidelity(self, logits: Tensor, teacher_logits: Tensor) -> dict[str, float]:
        """Return `agreement` of a student and its teacher on the test split, and what goes with it.

        Args:
            logits: Logits of the student.
            teacher_logits: Logits of its teacher.
        """

    def measure_samples(
        self, checkpoint: str, teachers: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        """Return test metrics of what a model generates by itself; none where it generates nothing.

        Args:
            checkpoint: File of the model.
            teachers: `checkpoint`, perhaps `weight`, of each of its teachers.
        """

    def hits(
        self,
        logits: Tensor,
        split: Split,
        networks: Iterable[nn.Module] = (),
        *,
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
    ) -> Tensor | None:
        """Return for each item whether it is right; None where models are not compared by that.

        Args:
            logits: Logits of the split.
            split: Split that was predicted.
            networks: Networks whose average predicted them, for what they generate.
            average: Average of the networks.
            weights: Weight of each network; all alike when not given.
        """

    def scores(self, logits: Tensor, split: Split, networks: Iterable[nn.Module] = ()) -> Tensor:
        """Return values, double, whose mean is the metric that models are compared by.

        There is one for each item, or for each group of items that depend on each other.

        Args:
            logits: Logits of the split.
            split: Split that was predicted.
            networks: Networks whose mean probabilities predicted them, for a metric of what they
                generate.
        """

    def unseen(self, logits: Mapping[Split, Tensor]) -> Unseen | None:
        """Return what becomes of outputs that a student was trained on no item of."""

    def diagnose(
        self, logits: Mapping[Split, Tensor], teacher_logits: Mapping[Split, Tensor]
    ) -> dict[str, Diagnostics]:
        """Return calibration, and fidelity to the teacher where there is one, of each split."""

    def cached_labels(self) -> Tensor:
        """Return the label of each item whose teacher logits are cached, int64 on the CPU.

        It is below 0 where there is none.
        """

    def output_names(self, outputs: Sequence[int]) -> list[str]:
        """Return the names of outputs: classes, or tokens as text."""

    def pictures(self, split: Split, items: Sequence[int]) -> list[bytes]:
        """Return items as PNG files of at most 96 x 96 pixels; none where they are no images."""

    def confusable(self, checkpoint: str, clusters: int) -> list[Sequence[int]]:
        """Return clusters of the outputs that a model confuses, for specialists."""
