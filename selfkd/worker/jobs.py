"""What a worker does, from plain data to plain data: check, train, label."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from selfkd.config import ModelConfig, Tree, from_tree
from selfkd.data import fingerprint
from selfkd.models import parameters_count
from selfkd.results import Row
from selfkd.soft_targets.store import check_shard, write_shard
from selfkd.soft_targets.upkeep import remember_user
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.remote import as_path
from selfkd.tasks.images.task import Bench, Split
from selfkd.tasks.images.train import train_classifier
from selfkd.training.fit import make_optimizer
from selfkd.training.functions import load_function
from selfkd.training.trial import Trial, run_function
from selfkd.worker import ensembling as members
from selfkd.worker import evaluate as scores

METRICS = ("val_accuracy", "val_nll")  # of what `fit` reports, what is measured on validation


def run_job(kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
    """Do the job that `kind` names; yield what it reports."""
    return _JOBS[kind](**payload)


def check(config: Tree) -> Iterator[Row]:
    """Load the data and try the models on two images; yield the facts, or the user's mistake."""
    try:
        bench = Bench(config)
        settings = bench.config
        if settings.search.metric not in METRICS:
            raise ValueError(
                f"search.metric must be one of {', '.join(METRICS)}, "
                f"got {settings.search.metric}: a training function of your own reports others"
            )
        sizes = {}
        for generation, model in enumerate((settings.model, settings.student or settings.model)):
            network = _tried(bench, model)
            sizes[str(generation)] = parameters_count(network)
        for model in settings.members.models:
            _tried(bench, model)
        train = settings.train
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
            "class_names": list(bench.data.class_names),
            "views": bench.views.count,
            "parameters": sizes,
            "fingerprint": bench.data.fingerprint,
            "val": _fingerprint(bench, "val"),
            "test": _fingerprint(bench, "test"),
        }
    }


def _fingerprint(bench: Bench, split: Split) -> str:
    data = bench.data
    return fingerprint(getattr(data, split), mean=data.mean, std=data.std)


def _tried(bench: Bench, model: ModelConfig) -> nn.Module:
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
    stage: str,
    seed: int,
    model: Tree,
    teachers: Sequence[Mapping[str, Any]],
    targets: str,
    student: str,
    function: str | None = None,
    **more: Any,
) -> Iterator[Row]:
    """Train one student and yield a row an epoch; one with which it is saved has its hash.

    Args:
        config: of the trial, values of the search put in.
        stage: what the trial belongs to, for messages and facts.
        seed: of initialisation, order and dropout.
        model: of the student.
        teachers: `hash`, `checkpoint` and perhaps `weight` of each; none to learn from labels.
        targets: folder of the soft targets.
        student: file to save to.
        function: reference of a training function of the user's own.
        more: of the built-in one, see `train_classifier`.
    """
    depends = {"function": function, **more}
    start = more.get("start") or {}
    if "checkpoint" in start:  # by what is in it: a run folder can be moved
        depends["start"] = load_tensors(as_path(start["checkpoint"]))[1]["hash"]
    trial = Trial(
        config=from_tree(config),
        stage=stage,
        seed=seed,
        model=ModelConfig(**model),
        teachers=teachers,
        targets=as_path(targets),
        path=as_path(student),
        more=depends,
    )
    if function is not None:
        yield from run_function(load_function(function), trial)
    else:
        yield from train_classifier(trial, **more)


def check_function(function: str) -> Iterator[Row]:
    """Import a training function; yield its name as a fact, or the user's mistake."""
    try:
        load_function(function)
    except ValueError as error:
        yield {"fault": str(error)}
        return
    yield {"facts": {"function": function}}


def label(
    config: Tree, checkpoint: str, targets: str, view: int, shard: int, run: str
) -> Iterator[Row]:
    """Store a teacher's answers to a shard of the training images, unless they are there.

    Args:
        config: of the run.
        checkpoint: of the teacher.
        targets: folder of the soft targets.
        view: of the images.
        shard: which of them.
        run: the run folder that wants them.

    Yields:
        `state`: kept, written, or remade where what was there was damaged.
    """
    bench = Bench(config)
    root = as_path(targets)
    origin = {"checkpoint": str(as_path(checkpoint).absolute()), "config": config}
    manifest = bench.manifest(bench.hash(checkpoint), bench.data.num_classes, origin)
    # first of all: a store that is being written must not look like one that nobody uses
    remember_user(root, manifest.teacher, manifest.data, as_path(run))
    found = check_shard(root, manifest, view=view, shard=shard)
    if found != "whole":
        logits = bench.answer(checkpoint, "train", view=view, rows=manifest.rows(shard))
        try:
            write_shard(root, manifest, view=view, shard=shard, logits=logits)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise OSError(
                f"targets.root must have room for the teachers' answers, got {root}, which is "
                "full: free some, or resume with --set targets.root=FOLDER on another disk"
            ) from None
    yield {"state": {"whole": "kept", "absent": "written", "damaged": "remade"}[found]}


_JOBS: dict[str, Callable[..., Iterator[Row]]] = {
    "check": check,
    "check_function": check_function,
    "train": train,
    "label": label,
    **members.JOBS,
    **scores.JOBS,
}
