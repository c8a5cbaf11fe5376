"""What a worker does, from plain data to plain data: check, train, label, score."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from selfkd import members, metrics
from selfkd.bench import Bench, Split
from selfkd.checkpoint import load_tensors, save_tensors
from selfkd.config import ModelConfig, Tree, from_tree, to_tree
from selfkd.data import Data, fingerprint
from selfkd.distiller import Distiller
from selfkd.functions import load_function
from selfkd.jobs import Row
from selfkd.loop import Trial, run_function
from selfkd.models import parameters_count
from selfkd.specialists import Specialist, relabel, specialist_split
from selfkd.store import check_shard, open_store, remember_user, write_shard
from selfkd.teacher import Ensemble
from selfkd.train import (
    NonFiniteLossError,
    fit,
    make_average,
    make_optimizer,
    make_scheduler,
)


def run_job(kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
    """Do the job that `kind` names; yield what it reports."""
    return _JOBS[kind](**payload)


def check(config: Tree) -> Iterator[Row]:
    """Load the data and try the models on two images; yield the facts, or the user's mistake."""
    try:
        bench = Bench(config)
        settings = bench.config
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
    trial = Trial(
        config=from_tree(config),
        stage=stage,
        seed=seed,
        model=ModelConfig(**model),
        teachers=teachers,
        targets=Path(targets),
        path=Path(student),
    )
    if function is not None:
        yield from run_function(load_function(function), trial)
    else:
        yield from train_classifier(trial, **more)


def train_classifier(
    trial: Trial,
    *,
    start: Mapping[str, Any] | None = None,
    specialist: Sequence[int] | None = None,
    cycles: int = 1,
) -> Iterator[Row]:
    """Train a classifier as the config says: the built-in training function.

    Args:
        trial: what is trained, by which teachers.
        start: `checkpoint` to start the weights from, or `seed` of the initialisation.
        specialist: classes that the student is to tell apart; all others are one to it.
        cycles: of the learning rate; the student is saved at the end of each, but for the last
            beside the trial's own file.
    """
    bench = Bench(to_tree(trial.config))
    options, seed, teachers = bench.config.train, trial.seed, trial.teachers
    start = start or {}
    torch.manual_seed(start.get("seed", seed))
    network = bench.make(trial.model)
    if "checkpoint" in start:
        network.load_state_dict(load_tensors(Path(start["checkpoint"]))[0])
    elif options.init == "teacher" and teachers:
        network.load_state_dict(load_tensors(Path(teachers[0]["checkpoint"]))[0])
    if "seed" in start:
        torch.manual_seed(seed)
    data, learner = bench.data, network
    facts: Row = {"stage": trial.stage, "seed": seed}
    if specialist is not None:
        learner = Specialist(network, specialist).to(bench.device)
        data, shift = _special_data(bench.data, specialist, seed)
        facts |= {"specialist": list(specialist), "dustbin_shift": shift}
    epochs = options.epochs // cycles * cycles
    optimizer = make_optimizer(
        learner,
        name=options.optimizer,
        lr=options.lr,
        momentum=options.momentum,
        weight_decay=options.weight_decay,
    )
    scheduler = make_scheduler(
        optimizer,
        schedule=options.schedule if cycles == 1 else "cosine",
        epochs=epochs,
        warmup_epochs=options.warmup_epochs if cycles == 1 else 0,
        steps_per_epoch=-(-len(data.train) // options.batch_size),
        cycles=cycles,
    )
    average = make_average(learner, decay=options.ema) if options.ema is not None else None
    rows = fit(
        learner,
        data,
        _distiller(bench, teachers, trial.targets),
        optimizer=optimizer,
        scheduler=scheduler,
        epochs=epochs,
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
    best = average.module if average is not None else learner
    best = best.network if isinstance(best, Specialist) else best
    try:
        for row in rows:
            cycle, rest = divmod(row["epoch"], epochs // cycles)
            if rest == 0:
                path = trial.path
                path = path if cycle == cycles else path.with_stem(f"{path.stem}_{cycle}")
                row["hash"] = bench.save(path, best, trial.model, facts)
                row["checkpoint"] = path.name
            yield row
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{trial.stage.replace('-', ' ')}: {error}") from None


def _special_data(data: Data, classes: Sequence[int], seed: int) -> tuple[Data, float]:
    """Return a specialist's data, half of it from its classes, and what corrects for that."""
    split, shift = specialist_split(data.train, classes, seed=seed)
    names = (*(data.class_names[number] for number in classes), "dustbin")
    special = replace(
        data,
        train=split,
        val=relabel(data.val, classes),
        test=relabel(data.test, classes),
        class_names=names,
    )
    return special, shift


def _distiller(bench: Bench, teachers: Sequence[Mapping[str, Any]], targets: Path) -> Distiller:
    smoothing = bench.config.train.label_smoothing
    if not teachers:
        return Distiller(label_smoothing=smoothing)
    distill = bench.config.distill
    weights = None
    if len(teachers) > 1 and "weight" in teachers[0]:
        weights = [row["weight"] for row in teachers]
    averaged = distill.average == "logits"  # by the store, once
    teacher = stored = None
    if distill.live:
        teacher = Ensemble([bench.teacher(member["checkpoint"]) for member in teachers])
    else:
        stored = open_store(
            targets,
            [member["hash"] for member in teachers],
            data=bench.data_key,
            average=distill.average,
            weights=weights,
        )
    return Distiller(
        teacher,
        targets=stored,
        temperature=distill.temperature,
        alpha=distill.alpha,
        average=distill.average,
        weights=weights if isinstance(teacher, Ensemble) or not averaged else None,
        label_smoothing=smoothing,
    )


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
    root = Path(targets)
    origin = {"checkpoint": str(Path(checkpoint).absolute()), "config": config}
    manifest = bench.manifest(bench.hash(checkpoint), bench.data.num_classes, origin)
    # first of all: a store that is being written must not look like one that nobody uses
    remember_user(root, manifest.teacher, manifest.data, Path(run))
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


def score(
    config: Tree, student: str, predictions: str, teachers: Sequence[Mapping[str, Any]] = ()
) -> Iterator[Row]:
    """Measure a chosen model on the test split, once.

    Args:
        config: of the run.
        student: checkpoint of the chosen model.
        predictions: file that its validation and test logits are saved to.
        teachers: `checkpoint` of each of its teachers, for the agreement with them.
    """
    bench = Bench(config)
    mark = bench.hash(student)
    logits = {split: bench.answer(student, split) for split in members.SPLITS}
    by_name = {str(split): answers for split, answers in logits.items()}
    save_tensors(Path(predictions), by_name, {"student": mark})
    size = sum(parameters_count(network) for network in bench.networks(student))
    row = {"hash": mark, "parameters": size, **members.test_row(bench, logits)}
    if teachers:
        taught = metrics.ensemble_logits(
            torch.stack([bench.answer(member["checkpoint"], "test") for member in teachers])
        )
        row["agreement"] = metrics.agreement(logits["test"], taught)
    yield row


_JOBS: dict[str, Callable[..., Iterator[Row]]] = {
    "check": check,
    "check_function": check_function,
    "train": train,
    "label": label,
    "score": score,
    **members.JOBS,
}
