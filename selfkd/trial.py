"""What a worker does, from plain data to plain data: check, train, score, label, ensemble."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from selfkd import metrics
from selfkd.checkpoint import load_tensors, save_tensors
from selfkd.config import Config, DataConfig, ModelConfig, Tree, from_tree
from selfkd.data import Data, fingerprint, load_data
from selfkd.distiller import Distiller
from selfkd.jobs import Row
from selfkd.models import make_model, parameters_count
from selfkd.targets import data_key, load_targets, save_targets, target_path
from selfkd.teacher import Ensemble, Teacher
from selfkd.train import (
    NonFiniteLossError,
    fit,
    make_average,
    make_optimizer,
    make_scheduler,
    predict,
)
from selfkd.views import Views

AUGMENTED_VIEWS = 8
Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, Split] = ("val", "test")  # what is predicted and kept


def run_job(kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
    """Do the job that `kind` names; yield what it reports."""
    return _JOBS[kind](**payload)


@lru_cache(maxsize=1)
def _load_data(config: DataConfig, seed: int, device: str) -> Data:
    data = load_data(
        config.name,
        root=config.root,
        download=config.download,
        train_size=config.train_size,
        val_size=config.val_size,
        image_size=config.image_size,
        in_memory=config.in_memory,
        seed=seed,
    )
    return data.to(device)


def _views(config: DataConfig, seed: int) -> Views:
    views = Views(crop=config.crop, flip=config.flip, jitter=config.jitter, seed=seed)
    count = config.views or (1 if views.is_identity else AUGMENTED_VIEWS)
    return replace(views, count=count)


class _Bench:
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
        self.data_key = data_key(self.data.fingerprint, self.views.recipe)

    def make(self, model: ModelConfig) -> torch.nn.Module:
        network = make_model(
            model.name,
            model.args,
            num_classes=self.data.num_classes,
            in_chans=self.data.in_chans,
            image_size=self.data.image_size,
        )
        return network.to(self.device)

    def model_of(self, generation: int) -> ModelConfig:
        config = self.config
        return config.student if generation > 0 and config.student else config.model

    def load(self, checkpoint: str) -> tuple[torch.nn.Module, dict[str, Any]]:
        tensors, facts = load_tensors(Path(checkpoint))
        if facts["classes"] != list(self.data.class_names):
            raise ValueError(f"{checkpoint} was trained for other classes than {self.data.name}'s")
        network = self.make(ModelConfig(name=facts["model"]["name"], args=facts["model"]["args"]))
        network.load_state_dict(tensors)
        return network, facts

    def predict(self, network: torch.nn.Module, split: Split, view: int | None = None) -> Tensor:
        return predict(
            network,
            self.data,
            split,
            views=None if view is None else self.views,
            view=view or 0,
            device=self.device,
            workers=self.config.data.workers,
        )

    def labels(self, split: Split) -> Tensor:
        labels: Tensor = getattr(self.data, split).labels.cpu()
        return labels

    def teacher(self, checkpoint: str) -> Teacher:
        network, facts = self.load(checkpoint)
        here = (self.data.mean, self.data.std)
        return Teacher(network, input_stats=here, trained_stats=(facts["mean"], facts["std"]))


def check(config: Tree) -> Iterator[Row]:
    """Load the data and try the models on two images; yield the facts, or the user's mistake."""
    try:
        bench = _Bench(config)
        sizes = {}
        for generation in (0, 1):
            network = _tried(bench, bench.model_of(generation))
            sizes[str(generation)] = parameters_count(network)
        train = bench.config.train
        make_optimizer(
            network,
            name=train.optimizer,
            lr=train.lr,
            momentum=train.momentum,
            weight_decay=train.weight_decay,
        )
        if train.init == "teacher" and sizes["0"] != sizes["1"]:
            raise ValueError("train.init must be fresh when student differs from model")
    except (ValueError, TypeError, OSError, RuntimeError) as error:
        yield {"fault": str(error)}
        return
    yield {
        "facts": {
            "images": {
                split: len(getattr(bench.data, split).labels) for split in ("train", "val", "test")
            },
            "classes": bench.data.num_classes,
            "views": bench.views.count,
            "parameters": sizes,
            "fingerprint": bench.data.fingerprint,
            "val": _fingerprint(bench, "val"),
            "test": _fingerprint(bench, "test"),
        }
    }


def _fingerprint(bench: _Bench, split: Split) -> str:
    data = bench.data
    return fingerprint(getattr(data, split), mean=data.mean, std=data.std)


def _tried(bench: _Bench, model: ModelConfig) -> torch.nn.Module:
    """Return a network that has answered two images as it should."""
    network = bench.make(model).eval()
    inputs, _, _ = next(
        bench.data.batches("train", batch_size=2, views=bench.views, device=bench.device)
    )
    size, classes = bench.data.image_size, bench.data.num_classes
    try:
        with torch.no_grad():
            shape = list(network(inputs).shape)
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise ValueError(
            f"model must take {size}x{size} images, got {model.name!r} with {model.args}: {error}"
        ) from error
    if shape != [2, classes]:
        raise ValueError(
            f"model must give {classes} logits an image, got {model.name!r} with {model.args}, "
            f"which gives {shape} for 2 images"
        )
    return network


def train(
    config: Tree,
    generation: int,
    seed: int,
    teachers: Sequence[Mapping[str, str]],
    targets: str,
    student: str,
) -> Iterator[Row]:
    """Train one student, save it, and yield a row an epoch; the last one carries its hash.

    Args:
        config: of the trial, values of the search put in.
        generation: 0 learns from labels only.
        seed: of initialisation, order and dropout.
        teachers: `hash` and `checkpoint` of each member; none in generation 0.
        targets: folder of the soft targets.
        student: file to save to.
    """
    bench = _Bench(config)
    options = bench.config.train
    torch.manual_seed(seed)
    model = bench.model_of(generation)
    network = bench.make(model)
    if options.init == "teacher" and teachers:
        network.load_state_dict(load_tensors(Path(teachers[0]["checkpoint"]))[0])
    optimizer = make_optimizer(
        network,
        name=options.optimizer,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    images = len(bench.data.train.labels)
    scheduler = make_scheduler(
        optimizer,
        schedule=options.schedule,
        epochs=options.epochs,
        warmup_epochs=options.warmup_epochs,
        steps_per_epoch=-(-images // options.batch_size),
    )
    average = make_average(network, decay=options.ema) if options.ema is not None else None
    rows = fit(
        network,
        bench.data,
        _distiller(bench, teachers, Path(targets)),
        optimizer=optimizer,
        scheduler=scheduler,
        epochs=options.epochs,
        batch_size=options.batch_size,
        generator=torch.Generator().manual_seed(seed),
        views=bench.views,
        device=bench.device,
        workers=bench.config.data.workers,
        clip_grad=options.clip_grad,
        average=average,
        precision=options.amp,
        compiled=options.compile,
    )
    try:
        for row in rows:
            if row["epoch"] == options.epochs:
                best = average.module if average is not None else network
                row["hash"] = _save_student(bench, best, model, generation, seed, Path(student))
            yield row
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"generation {generation}: {error}") from None


def _distiller(bench: _Bench, teachers: Sequence[Mapping[str, str]], targets: Path) -> Distiller:
    smoothing = bench.config.train.label_smoothing
    if not teachers:
        return Distiller(label_smoothing=smoothing)
    distill = bench.config.distill
    teacher = stored = None
    if distill.live:
        teacher = Ensemble([bench.teacher(member["checkpoint"]) for member in teachers])
    else:
        stored = load_targets(
            targets,
            [member["hash"] for member in teachers],
            data=bench.data_key,
            views=bench.views.count,
            images=len(bench.data.train.labels),
        )
    return Distiller(
        teacher,
        targets=stored,
        temperature=distill.temperature,
        alpha=distill.alpha,
        average=distill.average,
        label_smoothing=smoothing,
    )


def _save_student(
    bench: _Bench,
    network: torch.nn.Module,
    model: ModelConfig,
    generation: int,
    seed: int,
    path: Path,
) -> str:
    data = bench.data
    facts = {
        "model": {"name": model.name, "args": model.args},
        "classes": list(data.class_names),
        "in_chans": data.in_chans,
        "image_size": data.image_size,
        "mean": list(data.mean),
        "std": list(data.std),
        "data": data.name,
        "fingerprint": data.fingerprint,
        "generation": generation,
        "seed": seed,
        "parameters": parameters_count(network),
    }
    return save_tensors(path, network.state_dict(), facts)


def label(config: Tree, student: str, targets: str) -> Iterator[Row]:
    """Store a model's answers to every view of the training images, unless they are there."""
    bench = _Bench(config)
    network, facts = bench.load(student)
    key = {"teacher": facts["hash"], "data": bench.data_key}
    missing = [
        view
        for view in range(bench.views.count)
        if not target_path(Path(targets), view=view, **key).exists()
    ]
    for view in missing:
        logits = bench.predict(network, "train", view)
        save_targets(Path(targets), logits, view=view, **key)
    yield {"written": len(missing)}


def score(
    config: Tree, student: str, predictions: str, teachers: Sequence[Mapping[str, str]]
) -> Iterator[Row]:
    """Measure a chosen model on the test split, once.

    Args:
        config: of the run.
        student: checkpoint of the chosen model.
        predictions: file that its validation and test logits are saved to.
        teachers: `checkpoint` of each of its teachers, for the agreement with them.
    """
    bench = _Bench(config)
    network, facts = bench.load(student)
    logits: dict[str, Tensor] = {split: bench.predict(network, split) for split in SPLITS}
    save_tensors(Path(predictions), logits, {"student": facts["hash"]})
    row = {"hash": facts["hash"], "parameters": facts["parameters"], **_test_row(bench, logits)}
    if teachers:
        members = [
            bench.predict(bench.load(member["checkpoint"])[0], "test") for member in teachers
        ]
        taught = metrics.mean_probabilities(torch.stack(members))
        row["agreement"] = metrics.agreement(logits["test"], taught)
    yield row


def ensemble(config: Tree, members: Sequence[Mapping[str, str]]) -> Iterator[Row]:
    """Measure the average of several models' probabilities, from their saved predictions.

    Args:
        config: of the run.
        members: `hash` of each model and the file of its `predictions`.
    """
    bench = _Bench(config)
    saved = []
    for member in members:
        logits, facts = load_tensors(Path(member["predictions"]))
        if facts["student"] != member["hash"]:
            raise ValueError(f"{member['predictions']} was written by another model")
        saved.append(logits)
    mean: dict[str, Tensor] = {
        split: metrics.mean_probabilities(torch.stack([logits[split] for logits in saved]))
        for split in SPLITS
    }
    val = metrics.accuracy(mean["val"], bench.labels("val"))
    yield {"val_accuracy": val, **_test_row(bench, mean)}


def _test_row(bench: _Bench, logits: Mapping[str, Tensor]) -> Row:
    labels = bench.labels("test")
    return {
        "test_accuracy": metrics.accuracy(logits["test"], labels),
        "test_nll": metrics.nll(logits["test"], labels),
        "test_ece": metrics.ece(logits["test"], labels),
    }


_JOBS: dict[str, Callable[..., Iterator[Row]]] = {
    "check": check,
    "train": train,
    "label": label,
    "score": score,
    "ensemble": ensemble,
}
