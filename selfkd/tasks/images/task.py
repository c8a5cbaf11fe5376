"""The task of classifying images."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from unicodedata import normalize  # macOS decomposes the names of files

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn

from selfkd.analysis.metrics import agreement, fit_temperature
from selfkd.config import CheckpointConfig, ModelConfig
from selfkd.config.names import describe_classes, load_class_names
from selfkd.data.batches import batches
from selfkd.data.load import scaled
from selfkd.data.pictures import thumbnail
from selfkd.data.splits import subset
from selfkd.deployment.interface import LEAST_CALIBRATION, Interface
from selfkd.distill.teacher import Teacher
from selfkd.losses import Average
from selfkd.results import Diagnostics, Facts, Parts, Row, Unseen
from selfkd.soft_targets.manifest import Manifest, row_bytes, rows_of_shard
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.remote import as_path
from selfkd.storage.rows import load_row
from selfkd.storage.weights import find_weights
from selfkd.tasks.common import (
    describe_cached,
    open_checkpoint,
    spread,
)
from selfkd.tasks.images import evaluate
from selfkd.tasks.images.check import check_images
from selfkd.tasks.images.loaded import load_average
from selfkd.tasks.images.networks import ImageNetworks, NetworkFacts, parts_of
from selfkd.tasks.images.specialists import Specialist, cluster_classes, combine
from selfkd.tasks.images.train import train_classifier
from selfkd.tasks.task import Pool, Split
from selfkd.training.predict import predict_batches
from selfkd.training.trial import Trial

CLUSTER_TEMPERATURE = 4.0


class ImageTask(ImageNetworks):
    """The task of a config; see `selfkd.tasks.task.Task`."""

    def check(self, teachers: Sequence[Mapping[str, Any]] = ()) -> Facts:
        """Try the config's networks on two images; return the facts of them and of the data.

        Args:
            teachers: Networks that may teach, with which the further terms of the loss are tried.

        Raises:
            ValueError: They do not fit; says what must be otherwise.
        """
        return check_images(self, teachers, cached=describe_cached(self.manifest("", {})))

    def export(self, checkpoint: str, folder: Path, card: str) -> None:
        """Write nothing: `selfkd.load` and timm read the checkpoint itself."""

    def import_weights(self, source: CheckpointConfig, save: Path) -> str | None:
        """Save the network of a file from elsewhere as a checkpoint; return what is to be said.

        What selfkd has written itself brings the order of its classes and its normalisation.

        Raises:
            ValueError: Its classes or its tensors are not those of this data and network.
        """
        model = ModelConfig(name=source.model, args=source.args)
        path, own = Path(source.path), _own_facts(source.path)
        names = list(self.data.class_names if own is None else map(str, own.classes))
        if source.classes is not None:
            here = {normalize("NFC", name): name for name in map(str, self.data.class_names)}
            listed = load_class_names(Path(source.classes))
            names = [here.get(normalize("NFC", name), name) for name in listed]
        if sorted(names) != sorted(map(str, self.data.class_names)):
            raise ValueError(
                f"{source.path} must be for the classes of {self.data.name}: "
                f"{source.classes or 'it'} has {describe_classes(names, self.data.class_names)}"
            )
        network = self.make(model)
        shapes = {name: tensor.shape for name, tensor in network.state_dict().items()}
        try:
            found = find_weights(path, shapes, key=source.weights, outputs=len(names))
        except ValueError as error:
            raise ValueError(
                f"{source.path} must fit {source.model!r} with {source.args} for {len(names)} "
                f"classes: {error}"
            ) from None
        network.load_state_dict(found.tensors)
        more: Row = {"classes": names, "fingerprint": None, "from": source.path}
        if own is not None:
            more |= {"fingerprint": own.fingerprint, "mean": own.mean, "std": own.std}
        if source.mean is not None and source.std is not None:
            sizes = (len(source.mean), len(source.std))
            if sizes != (self.data.in_chans,) * 2 or not min(source.std) > 0:
                raise ValueError(
                    f"mean and std of {source.path} must be {self.data.in_chans} numbers each, std "
                    f"above 0, got {source.mean} and {source.std}"
                )
            more |= {"mean": source.mean, "std": source.std}
        self.save(save, network, model, more)
        return found.note and f"{source.path} {found.note}"

    def digest(self, checkpoint: str) -> str:
        """Return the hash that a checkpoint's logits are cached under."""
        path = as_path(checkpoint)
        if path.suffix == ".json":
            return load_row(Parts, path).hash
        return str(load_tensors(path)[1]["hash"])

    def networks(self, checkpoint: str) -> Iterator[nn.Module]:
        """Yield the networks that one prediction of a checkpoint takes."""
        for part in parts_of(checkpoint):
            yield self.load(part)[0]

    def refresh(self, network: nn.Module) -> None:
        """Make the statistics of batch normalisation those of the weights."""
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in network.modules()):
            batches = self.data.batches("train", batch_size=500, device=self.device, smallest=2)
            update_bn((inputs for inputs, _, _ in batches), network)

    def example(self, items: int) -> Tensor:
        """Return inputs of so many images."""
        if self.data.features is not None:
            return torch.zeros((items, self.data.in_chans), device=self.device)
        size = self.data.test_size
        return torch.zeros((items, self.data.in_chans, size, size), device=self.device)

    # --- training and predicting ---

    def train(self, trial: Trial, **options: Any) -> Iterator[Row]:
        """Train a classifier; see `selfkd.tasks.images.train.train_classifier`."""
        return train_classifier(self, trial, **options)

    def predict(self, checkpoint: str, split: Split) -> Tensor:
        """Return the logits of a checkpoint, or of a generalist with its specialists.

        Args:
            checkpoint: File of a network, or the JSON file that names a generalist's and its
                specialists' checkpoints.
            split: Split that is predicted.
        """
        return torch.cat(list(self._predict_parts(checkpoint, split, None, None)))

    def predict_batches(
        self, checkpoint: str, items: range, *, view: int, of: Pool = "train"
    ) -> Iterator[Tensor]:
        """Yield the logits of a checkpoint for images, batch by batch, to be cached.

        Args:
            checkpoint: File of a network, or of a generalist with its specialists.
            items: Images of the training split, or of the transfer set.
            view: Number of their view.
            of: Which of them they are of.
        """
        return self._predict_parts(checkpoint, of, view, items)

    def predict_with(self, network: nn.Module, split: Split, *, like: str | None = None) -> Tensor:
        """Return the logits of a network that was made for this data, or like a checkpoint's."""
        model: nn.Module | Teacher = network
        if like is not None:
            model = self.as_teacher(network, self._facts(like), copy=False)
        return torch.cat(list(self._predict(model, split, None, None)))

    def _facts(self, checkpoint: str) -> NetworkFacts:
        return open_checkpoint(checkpoint, NetworkFacts)[1]

    def _predict_parts(
        self, checkpoint: str, split: Split | Pool, view: int | None, items: range | None
    ) -> Iterator[Tensor]:
        generalist, *others = parts_of(checkpoint)
        batches = [self._predict(self.teacher(generalist), split, view, items)]
        found, combined = list[NetworkFacts](), as_path(checkpoint).suffix == ".json"
        for part in others:
            network, facts = self.load(part)
            special = Specialist(network, facts.specialist).to(self.device)
            batches.append(self._predict(special, split, view, items))
            found.append(facts)
        if others:  # of which each may have halved its own batches
            batches = [iter([torch.cat(list(own))]) for own in batches]
        for logits, *parts in zip(*batches, strict=True):
            for own, facts in zip(parts, found, strict=True):
                own[:, -1] += facts.dustbin_shift
            specialists = [(f.specialist, own) for f, own in zip(found, parts, strict=True)]
            yield combine(logits, specialists) if combined else logits

    def _predict(
        self,
        model: nn.Module | Teacher,
        split: Split | Pool,
        view: int | None,
        items: range | None,
    ) -> Iterator[Tensor]:
        data = self.require_transfer().of(self.data) if split == "transfer" else self.data
        return predict_batches(
            model,
            data,
            "train" if split == "transfer" else split,
            views=None if view is None else self.views,
            view=view or 0,
            device=self.device,
            workers=self.config.data.workers,
            rows=items,
        )

    def manifest(self, teacher: str, origin: Mapping[str, Any], *, of: Pool = "train") -> Manifest:
        """Return the manifest of a teacher's cached logits of training, or of the transfer set."""
        top_k = self.config.targets.top_k
        data = self.data if of == "train" else self.require_transfer().of(self.data)
        return Manifest(
            teacher=teacher,
            data=self.key_of(data.fingerprint),
            fingerprint=data.fingerprint,
            recipe=dict(self.views.recipe),
            views=self.views.count,
            images=len(data.train),
            classes=self.data.num_classes,
            top_k=top_k,
            shard_size=rows_of_shard(
                self.config.targets.shard_size, row_bytes(self.data.num_classes, top_k=top_k)
            ),
            origin=dict(origin),
        )

    def write(self, checkpoint: str, root: Path, *, shard: int, run: Path) -> Row:
        """Refuse to write.

        Raises:
            ValueError: Always.
        """
        raise ValueError("text is written with task text only")

    # --- deployment ---

    def interface(self) -> Interface:
        """Return what a network of these images takes and gives when it is exported."""
        return Interface(input="images" if self.data.features is None else "features")

    def combined(
        self,
        checkpoints: Sequence[str],
        *,
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
    ) -> nn.Module:
        """Return the network of a checkpoint, or the average of several as one.

        Raises:
            ValueError: One is a generalist with its specialists.
        """
        for checkpoint in checkpoints:
            if as_path(checkpoint).suffix == ".json":
                raise ValueError(
                    f"{checkpoint} cannot be exported: it is a generalist with its specialists, "
                    "and which of them predict depends on the image. Distil a student of them: "
                    "python -m selfkd.ensemble"
                )
        if len(checkpoints) == 1:
            return self.load(checkpoints[0])[0]
        found = load_average(checkpoints, average=average, weights=weights)
        return found.network.to(self.device)

    def inputs(self, split: Split, most: int, *, like: str | None = None) -> Tensor:
        """Return images `[items, channels, height, width]`, normalised like a checkpoint's.

        Of arrays they are features `[items, F]`.
        """
        return self._inputs(split, spread(len(getattr(self.data, split)), most), like)

    def calibration(self, most: int, *, like: str | None = None) -> Tensor:
        """Return training images of all classes.

        Raises:
            ValueError: There are fewer than `LEAST_CALIBRATION`, or a class has none.
        """
        labels, names = self.labels("train"), self.data.class_names
        count = min(most, len(labels))
        chosen = subset(labels, count, seed=self.config.seed)
        if count < LEAST_CALIBRATION:
            raise ValueError(
                f"data.train_size must be at least {LEAST_CALIBRATION} for the ranges of int8, got "
                f"{len(labels)} training images"
            )
        absent = set(range(len(names))) - set(labels[chosen].tolist())
        if absent:
            few = f"{len(absent)} of the {len(names)} classes, such as {names[min(absent)]!r}"
            way = (
                f"got {count} images: --set deploy.calibration={max(most, 4 * len(names))}"
                if count < len(labels)
                else "which the training split has none of: deploy its file by --checkpoint, with "
                "data of all classes"
            )
            raise ValueError(
                f"the ranges of int8 must be measured on images of each class; without one are "
                f"{few}, {way}"
            )
        return self._inputs("train", chosen.tolist(), like)

    def _inputs(self, split: Split, items: Sequence[int], like: str | None) -> Tensor:
        data, own = self.data, getattr(self.data, split)
        chosen = own.take(torch.as_tensor(items).to(own.labels.device))
        chosen = scaled(chosen, data.test_size)  # as the model is given them
        mean, std = data.mean, data.std
        if like is not None:
            facts = self._facts(like)
            mean, std = facts.mean, facts.std
        return next(batches(chosen, mean=mean, std=std, batch_size=len(chosen), device="cpu"))[0]

    # --- evaluation ---

    def evaluate(
        self,
        logits: Mapping[Split, Tensor],
        networks: Iterable[nn.Module] = (),
        *,
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
    ) -> dict[str, float]:
        """Return val_accuracy and val_nll; test_accuracy, test_nll, test_ece and test_errors."""
        return evaluate.measure({split: (z, self.labels(split)) for split, z in logits.items()})

    def fidelity(self, logits: Tensor, teacher_logits: Tensor) -> dict[str, float]:
        """Return the agreement of a student and its teacher on test."""
        return {"agreement": agreement(logits, teacher_logits)}

    def measure_samples(
        self, checkpoint: str, teachers: Sequence[Mapping[str, Any]]
    ) -> dict[str, float]:
        """Return nothing: classifiers generate nothing."""
        return {}

    def hits(
        self,
        logits: Tensor,
        split: Split,
        networks: Iterable[nn.Module] = (),
        *,
        average: Average = "probabilities",
        weights: Sequence[float] | None = None,
    ) -> Tensor:
        """Return for each image whether its class is predicted."""
        return logits.argmax(dim=-1) == self.labels(split)

    def scores(self, logits: Tensor, split: Split, networks: Iterable[nn.Module] = ()) -> Tensor:
        """Return for each image 1 where its class is predicted, else 0."""
        return self.hits(logits, split).double()

    def unseen(self, logits: Mapping[Split, Tensor]) -> Unseen | None:
        """Return what becomes of classes that a student was trained on no image of."""
        seen = self.config.data.classes
        if not seen:
            return None
        labels = self.labels("val"), self.labels("test")
        return evaluate.measure_unseen(
            (logits["val"], logits["test"]), labels, seen=seen, classes=self.data.num_classes
        )

    def diagnose(
        self, logits: Mapping[Split, Tensor], teacher_logits: Mapping[Split, Tensor]
    ) -> dict[str, Diagnostics]:
        """Return calibration, and fidelity to the teacher where there is one, of each split."""
        temperature = fit_temperature(logits["val"], self.labels("val"))
        names = [str(name) for name in self.data.class_names]
        return {
            split: evaluate.diagnosis(
                own,
                self.labels(split),
                names=names,
                temperature=temperature,
                teacher_logits=teacher_logits.get(split),
            )
            for split, own in logits.items()
        }

    def pictures(self, split: Split, items: Sequence[int]) -> list[bytes]:
        """Return images as PNG files of at most 96 x 96 pixels; none of arrays."""
        if self.data.features is not None:
            return []
        images = getattr(self.data, split).images
        return [thumbnail(images[item].cpu().numpy()) for item in items]

    def confusable(self, checkpoint: str, clusters: int) -> list[Sequence[int]]:
        """Return clusters of the classes that a generalist confuses."""
        # softened: a confident network's errors are too few to see which classes it confuses
        probabilities = (self.predict(checkpoint, "val") / CLUSTER_TEMPERATURE).softmax(dim=1)
        found = cluster_classes(probabilities, clusters=clusters, seed=self.config.seed)
        return [list(classes) for classes in found]


def _own_facts(path: str) -> NetworkFacts | None:
    """Return the metadata of a file that selfkd has written; None of any other."""
    try:
        return open_checkpoint(path, NetworkFacts)[1]
    except (OSError, ValueError):
        return None
