"""Training of a classifier as the config says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from timm.layers import convert_sync_batchnorm
from torch import nn

from selfkd.config import TrainConfig
from selfkd.data import Data
from selfkd.data.batches import batch_sizes
from selfkd.data.loader import kept_processes
from selfkd.deployment.low_bits import plain, round_weights
from selfkd.distill.distiller import Distiller, Loss
from selfkd.distill.teacher import Ensemble
from selfkd.errors import NonFiniteLossError
from selfkd.results import Row
from selfkd.soft_targets.joined import EachView, open_joined
from selfkd.soft_targets.resident import resident
from selfkd.soft_targets.transforms import (
    ConfidenceWeighted,
    Targets,
    Transform,
    VirtualTargets,
    transform_targets,
)
from selfkd.tasks.common import (
    add_projections,
    make_fresh,
    mixes_transfer,
    optimizer_of,
    teacher_weights,
    training_facts,
)
from selfkd.tasks.images.networks import ImageNetworks
from selfkd.tasks.images.specialists import Specialist, relabel, specialist_split
from selfkd.tasks.images.terms import terms_of
from selfkd.training.compiling import Graphs
from selfkd.training.fit import Training, fit
from selfkd.training.optimizers import make_average, make_scheduler, put_channels_last
from selfkd.training.ranks import smallest_batch
from selfkd.training.trial import Trial


def train_classifier(
    task: ImageNetworks,
    trial: Trial,
    *,
    start: Mapping[str, Any] | None = None,
    specialist: Sequence[int] | None = None,
    cycles: int = 1,
    transform: Transform = "none",
    bits: int | None = None,
) -> Iterator[Row]:
    """Train a classifier as the config says: the built-in training function.

    Args:
        task: Data and networks.
        trial: Student and its teachers.
        start: `checkpoint` to start the weights from, or `seed` of the initialisation.
        specialist: Classes that the student tells apart; all others are one to it.
        cycles: Cycles of the learning rate; the student is saved at the end of each, but for the
            last beside the trial's own file.
        transform: Transform of the teacher logits.
        bits: Bits that the weights of linear layers are rounded to in training, and saved rounded
            to; not rounded when not given.
    """
    options, ranks = task.config.train, trial.ranks
    learner = _fresh(task, trial, start or {}, bits)
    data = task.data
    facts = training_facts(trial, bits)
    if specialist is not None:
        learner = Specialist(learner, specialist).to(task.device)
        data, shift = _special_data(task.data, specialist, trial.seed)
        facts |= {"specialist": list(specialist), "dustbin_shift": shift}
    smallest = smallest_batch(
        learner, batch_size=options.batch_size, images=len(data.train), ranks=ranks.size
    )
    steps = len(batch_sizes(len(data.train), options.batch_size, smallest))
    distiller = _distiller(task, trial, transform, learner)
    training = _training(task, learner, options, trial.seed, steps, cycles, distiller)
    if not ranks.first:  # dropout differs from rank to rank
        torch.manual_seed(trial.seed + ranks.rank)
    if (state := trial.checkpoint) is not None:
        training.load_state_dict(state)
        trial.progress.state = None
        yield from [dict(row) for row in trial.progress.rows]
    epochs = options.epochs // cycles * cycles
    rows = fit(
        training,
        data,
        distiller,
        epochs=epochs,
        batch_size=options.batch_size,
        views=task.views,
        workers=task.config.data.workers,
        clip_grad=options.clip_grad,
        compiled=options.compile,
        ranks=ranks,
        transfer=task.transfer if mixes_transfer(trial, transform) else None,
        repeats=task.config.data.repeats,
    )
    graphs = Graphs(options.compile)
    best = training.best
    best = best.network if isinstance(best, Specialist) else best
    try:
        with kept_processes():
            for row in rows:
                cycle, rest = divmod(row["epoch"], epochs // cycles)
                if rest == 0 and ranks.first:
                    path = trial.path
                    path = path if cycle == cycles else path.with_stem(f"{path.stem}_{cycle}")
                    row["hash"] = task.save(path, plain(best), trial.model, facts)
                    row["checkpoint"] = path.name
                graphs.add_to(row)
                unfinished = row["epoch"] < epochs
                trial.progress.reached(row, training.state_dict() if unfinished else None)
                yield row
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{trial.stage.replace('-', ' ')}: {error}") from None


def _fresh(
    task: ImageNetworks, trial: Trial, start: Mapping[str, Any], bits: int | None
) -> nn.Module:
    """Return a network to be trained, the same on all ranks."""
    network = make_fresh(task, trial, start)
    if trial.ranks.size > 1 and task.device == "cuda":  # torch has none on the CPU
        network = convert_sync_batchnorm(network)
    if bits is not None:
        round_weights(network, bits)
    return network


def _training(
    task: ImageNetworks,
    learner: nn.Module,
    options: TrainConfig,
    seed: int,
    steps: int,
    cycles: int,
    distiller: Loss,
) -> Training:
    optimizer = optimizer_of(learner, options)
    own = distiller.projections if isinstance(distiller, Distiller) else nn.ModuleDict()
    projections = own if len(own) else None
    add_projections(optimizer, projections, options)
    scheduler = make_scheduler(
        optimizer,
        schedule=options.schedule if cycles == 1 else "cosine",
        epochs=options.epochs // cycles * cycles,
        warmup_epochs=options.warmup_epochs if cycles == 1 else 0,
        steps_per_epoch=steps,
        cycles=cycles,
    )
    return Training(
        student=learner,
        optimizer=optimizer,
        scheduler=scheduler,
        average=make_average(learner, decay=options.ema) if options.ema is not None else None,
        generator=torch.Generator().manual_seed(seed),
        projections=projections,
        device=task.device,
        precision=task.precision,
        channels_last=bool(options.channels_last),
    )


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


def _distiller(task: ImageNetworks, trial: Trial, transform: Transform, learner: nn.Module) -> Loss:
    """Return the loss of a trial; layers are compared with those of teachers that are run live."""
    distill, smoothing = task.config.distill, task.config.train.label_smoothing
    teachers = trial.teachers
    if transform == "virtual":
        return Distiller(
            targets=VirtualTargets(task.labels("train"), classes=task.data.num_classes),
            temperature=distill.temperature,
            alpha=distill.alpha,
            label_smoothing=smoothing,
            quick=bool(task.config.train.fused),
        )
    if not teachers:
        return Distiller(label_smoothing=smoothing)
    weights = teacher_weights(teachers)
    teacher, stored = None, cast(Targets | None, None)
    if distill.runs_teacher:
        with torch.random.fork_rng(devices=[]):  # what is drawn does not depend on it
            members = [task.teacher(member["checkpoint"]) for member in teachers]
        if task.config.train.channels_last:
            for member in members:
                put_channels_last(member.module)
        teacher = Ensemble(members)
    else:
        transfer = task.transfer if mixes_transfer(trial, transform) else None
        found = open_joined(
            trial.targets,
            [member["hash"] for member in teachers],
            data=task.data_key,
            transfer=None if transfer is None else task.key_of(transfer.fingerprint),
            average=distill.average,
            weights=weights,
        )
        kept = resident(found, task.device) if transform == "none" else found
        stored = kept if task.config.data.repeats == 1 else EachView(kept)
        if distill.average == "logits":  # by the store, once
            weights = None
    if transform != "none" and stored is not None:
        return _of_transformed(task, trial, transform, stored, weights)
    terms = terms_of(task, task.config, weights=weights, seed=trial.seed)
    example = task.two_images()[0] if terms and teacher is not None else None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        return Distiller(
            teacher,
            targets=stored,
            temperature=distill.temperature,
            alpha=distill.alpha,
            average=distill.average,
            weights=weights,
            label_smoothing=smoothing,
            terms=terms,
            student=learner,
            example=example,
            quick=bool(task.config.train.fused),
        )


def _of_transformed(
    task: ImageNetworks,
    trial: Trial,
    transform: Transform,
    stored: Targets,
    weights: Sequence[float] | None,
) -> Loss:
    """Return the loss of a trial with transformed targets, which has no further terms."""
    distill, smoothing = task.config.distill, task.config.train.label_smoothing
    if transform == "confidence":
        return ConfidenceWeighted(
            stored,
            average=distill.average,
            weights=weights,
            label_smoothing=smoothing,
            mean=trial.ranks.mean,
        )
    targets, temperature = transform_targets(
        stored,
        transform,
        task.cached_labels(),
        classes=task.data.num_classes,
        temperature=distill.temperature,
        average=distill.average,
        weights=weights,
        seed=trial.seed,
    )
    return Distiller(
        targets=targets, temperature=temperature, alpha=distill.alpha, label_smoothing=smoothing
    )
