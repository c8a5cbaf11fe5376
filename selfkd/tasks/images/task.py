"""Where a job works: data, views, device, and the networks of checkpoints, from a config."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from selfkd.config import Config, DataConfig, ModelConfig, Tree, from_tree
from selfkd.data import Data, load_data
from selfkd.data.augmentation import Views
from selfkd.distill.teacher import Teacher
from selfkd.models import make_model, parameters_count
from selfkd.soft_targets.manifest import Manifest, data_key
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.files import load_json
from selfkd.storage.remote import as_path
from selfkd.tasks.images.specialists import Specialist, combine
from selfkd.training.fit import predict

AUGMENTED_VIEWS = 8
Split = Literal["train", "val", "test"]


@lru_cache(maxsize=1)
def _load_data(config: DataConfig, seed: int, device: str) -> Data:
    data = load_data(
        config.name,
        root=config.root,
        download=config.download,
        train_size=config.train_size,
        val_size=config.val_size,
        classes=config.classes,
        image_size=config.image_size,
        in_memory=config.in_memory,
        seed=seed,
    )
    return data.to(device)


def _views(config: DataConfig, seed: int) -> Views:
    views = Views(crop=config.crop, flip=config.flip, jitter=config.jitter, seed=seed)
    count = config.views or (1 if views.is_identity else AUGMENTED_VIEWS)
    return replace(views, count=count)


class Bench:
    """Data, views and device of a job: what its config says about where it works."""

    def __init__(self, tree: Tree) -> None:
        self.config: Config = from_tree(tree)
        torch.set_num_threads(max(1, int(self.config.resources.cpu)))
        self.device = "cuda" if self.config.resources.gpu > 0 else "cpu"
        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError(
                f"resources.gpu must be 0 where torch finds no GPU, got {self.config.resources.gpu}"
            )
        self.data = _load_data(self.config.data, self.config.seed, self.device)
        self.views = _views(self.config.data, self.config.seed)
        top_k = self.config.targets.top_k
        if top_k is not None and top_k >= self.data.num_classes:
            raise ValueError(
                f"targets.top_k must be in [1, {self.data.num_classes - 1}], got {top_k}"
            )
        self.data_key = data_key(self.data.fingerprint, self.views.recipe, top_k=top_k)

    def labels(self, split: Split) -> Tensor:
        """Return a split's labels, on the CPU."""
        labels: Tensor = getattr(self.data, split).labels.cpu()
        return labels

    def make(self, model: ModelConfig, *, classes: int | None = None) -> nn.Module:
        """Return a fresh network for this data."""
        network = make_model(
            model.name,
            model.args,
            num_classes=classes or self.data.num_classes,
            in_chans=self.data.in_chans,
            image_size=self.data.image_size,
        )
        return network.to(self.device)

    def save(
        self, path: Path, network: nn.Module, model: ModelConfig, more: Mapping[str, Any]
    ) -> str:
        """Save a network with the facts that it is loaded by; return its hash."""
        data = self.data
        facts = {
            "model": {"name": model.name, "args": model.args},
            "classes": list(data.class_names),
            "in_chans": data.in_chans,
            "image_size": data.image_size,
            "mean": list(data.mean),
            "std": list(data.std),
            "data": data.name,
            "fingerprint": data.fingerprint,
            "parameters": parameters_count(network),
            **more,
        }
        return save_tensors(path, network.state_dict(), facts)

    def load(self, checkpoint: str) -> tuple[nn.Module, dict[str, Any]]:
        """Return the network of a checkpoint, and its facts.

        Raises:
            ValueError: it was trained for other classes, or is of no network that can be made.
        """
        tensors, facts = load_tensors(as_path(checkpoint))
        here = self.data.class_names
        if sorted(facts["classes"]) != sorted(here):
            raise ValueError(
                f"{checkpoint} was trained for other classes than {self.data.name}'s: "
                f"{_few(facts['classes'])} instead of {_few(here)}"
            )
        try:
            model = ModelConfig.of_checkpoint(facts["model"])
            network = self.make(model)
        except ValueError as error:
            raise ValueError(f"{checkpoint} cannot be rebuilt: {error}") from None
        network.load_state_dict(tensors)
        return network, {**facts, "model": {"name": model.name, "args": model.args}}

    def teacher(self, checkpoint: str) -> Teacher:
        """Return a checkpoint's network as a teacher of this data, its classes in order."""
        network, facts = self.load(checkpoint)
        return Teacher(
            network,
            input_stats=(self.data.mean, self.data.std),
            trained_stats=(facts["mean"], facts["std"]),
            columns=[facts["classes"].index(name) for name in self.data.class_names],
        )

    def networks(self, checkpoint: str) -> Iterator[nn.Module]:
        """Yield the networks that a checkpoint's answer takes."""
        for part in _parts(checkpoint):
            yield self.load(part)[0]

    def hash(self, checkpoint: str) -> str:
        """Return the hash by which a checkpoint's answers are kept."""
        path = as_path(checkpoint)
        facts = load_json(path) if path.suffix == ".json" else load_tensors(path)[1]
        return str(facts["hash"])

    def answer(
        self, checkpoint: str, split: Split, *, view: int | None = None, rows: range | None = None
    ) -> Tensor:
        """Return the logits of a checkpoint, or of a generalist with its specialists.

        Args:
            checkpoint: of a network, or the JSON file that names a generalist's and its
                specialists' checkpoints.
            split: what is asked.
            view: of the images; as they are when not given.
            rows: which images; all when not given.
        """
        generalist, *others = _parts(checkpoint)
        logits = self._predict(self.teacher(generalist), split, view, rows)
        if as_path(checkpoint).suffix != ".json":
            return logits
        specialists = []
        for part in others:
            network, facts = self.load(part)
            special = Specialist(network, facts["specialist"]).to(self.device)
            own = self._predict(special, split, view, rows)
            own[:, -1] += facts["dustbin_shift"]
            specialists.append((facts["specialist"], own))
        return combine(logits, specialists)

    def _predict(
        self, model: nn.Module | Teacher, split: Split, view: int | None, rows: range | None
    ) -> Tensor:
        return predict(
            model,
            self.data,
            split,
            views=None if view is None else self.views,
            view=view or 0,
            device=self.device,
            workers=self.config.data.workers,
            rows=rows,
        )

    def manifest(self, teacher: str, classes: int, origin: Mapping[str, Any]) -> Manifest:
        """Return what is to be said of the store of a teacher's answers."""
        return Manifest(
            teacher=teacher,
            data=self.data_key,
            fingerprint=self.data.fingerprint,
            recipe=dict(self.views.recipe),
            views=self.views.count,
            images=len(self.data.train),
            classes=classes,
            top_k=self.config.targets.top_k,
            shard_size=self.config.targets.shard_size,
            origin=dict(origin),
        )


def _parts(checkpoint: str) -> list[str]:
    path = as_path(checkpoint)
    if path.suffix != ".json":
        return [checkpoint]
    return [str(path.parent / part) for part in load_json(path)["parts"]]


def _few(names: Any) -> str:
    names = list(names)
    return f"{len(names)} classes ({', '.join(map(str, names[:5]))}{', …' if names[5:] else ''})"
