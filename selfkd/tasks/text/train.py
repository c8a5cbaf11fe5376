"""Training of a language model as the config says, token by token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfkd.config import TrainConfig
from selfkd.deployment.low_bits import plain, round_weights
from selfkd.distill.outputs import check_graph, take_logits
from selfkd.errors import NonFiniteLossError
from selfkd.results import Row
from selfkd.soft_targets.transforms import Transform
from selfkd.tasks.common import (
    add_projections,
    make_fresh,
    mixes_transfer,
    optimizer_of,
    training_facts,
)
from selfkd.tasks.text.batches import Batch, TrainingText
from selfkd.tasks.text.data import IGNORED
from selfkd.tasks.text.evaluate import measure_matches
from selfkd.tasks.text.loss import Loss, make_loss
from selfkd.tasks.text.networks import TextNetworks
from selfkd.tasks.text.on_policy import Writer, is_on_policy
from selfkd.tasks.text.terms import FurtherTerms, make_further
from selfkd.tasks.text.write import training_text
from selfkd.training.device import precision_of
from selfkd.training.fit import Training, check_finite, descend
from selfkd.training.optimizers import make_average
from selfkd.training.predict import autocast
from selfkd.training.trial import Trial

CHECK_STEPS = 100  # steps between two checks of the loss, which on a GPU wait for it


def train_language_model(
    task: TextNetworks,
    trial: Trial,
    *,
    start: Mapping[str, Any] | None = None,
    transform: Transform = "none",
    bits: int | None = None,
) -> Iterator[Row]:
    """Train a language model; yield a row after each of `train.epochs` equal parts of the steps.

    Args:
        task: Text and networks.
        trial: Student and its teachers.
        start: `checkpoint` to start the weights from, or `seed` of the initialisation.
        transform: Transform of the teacher logits.
        bits: Bits that the weights of linear layers are rounded to in training, and saved rounded
            to; not rounded when not given.
    """
    options, data = task.config.train, training_text(task, trial)
    distill = task.config.distill
    student = _student(task, trial, start or {}, bits)
    facts = training_facts(trial, bits)
    further = make_further(task, trial, student) if transform == "none" else None
    loss = make_loss(task, trial, transform, further)
    training = _training(student, options, task.device, further)
    if (state := trial.checkpoint) is not None:
        training.load_state_dict(state)
        trial.progress.state = None
        yield from [dict(row) for row in trial.progress.rows]
    more = task.transfer if mixes_transfer(trial, transform) else None
    text, writer = TrainingText(data, options, trial.seed, more), None
    if trial.teachers and distill.on_policy > 0:
        writer = Writer(student, data, options, end=task.data.end, seed=trial.seed)
        if state is not None:
            writer.load_state_dict(state["writer"])

    def batches(step: int) -> list[Batch]:
        on_policy = writer is not None and is_on_policy(step, distill.on_policy)
        return writer() if writer is not None and on_policy else text(step)

    forward = cast(nn.Module, torch.compile(student)) if options.compile else student
    begun = time.perf_counter() - training.seconds
    try:
        for part in range(training.epoch + 1, options.epochs + 1):
            until = options.steps * part // options.epochs
            terms = _train_steps(training, forward, batches, loss, options, until)
            measured = measure(task, training.best)
            training.epoch, training.seconds = part, time.perf_counter() - begun
            row: Row = {
                "epoch": part,
                **terms,
                "lr": float(training.optimizer.param_groups[0]["lr"]),
                **measured,
                "seconds": training.seconds,
            }
            if writer is not None:
                row["cut"] = writer.take_cut()
            unfinished = part < options.epochs
            if not unfinished:
                row["hash"] = task.save(trial.path, plain(training.best), trial.model, facts)
                row["checkpoint"] = trial.path.name
            trial.progress.reached(row, _state(training, writer) if unfinished else None)
            yield row
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{trial.stage.replace('-', ' ')}: {error}") from None


def _training(
    student: nn.Module, options: TrainConfig, device: str, further: FurtherTerms | None
) -> Training:
    optimizer = optimizer_of(student, options)
    own = further.projections if further is not None else nn.ModuleDict()
    projections = own if len(own) else None
    add_projections(optimizer, projections, options)
    return Training(
        student=student,
        optimizer=optimizer,
        projections=projections,
        average=make_average(student, decay=options.ema) if options.ema is not None else None,
        generator=torch.Generator(),  # the order is a function of seed and step
        device=device,
        precision=precision_of(options.amp, device),
    )


def _student(
    task: TextNetworks, trial: Trial, start: Mapping[str, Any], bits: int | None
) -> nn.Module:
    """Return a network to be trained; one that is rounded begins whole, without adapters."""
    if bits is None:
        return make_fresh(task, trial, start)
    if "checkpoint" in start:
        torch.manual_seed(trial.seed)
        student, _ = task.load(start["checkpoint"])
    else:
        student = make_fresh(task, trial, start)
    round_weights(student, bits)
    return student


def _state(training: Training, writer: Writer | None) -> dict[str, Any]:
    """Return what a training resumes from, with what its student has written and not read yet."""
    written = {} if writer is None else {"writer": writer.state_dict()}
    return {**training.state_dict(), **written}


def rate(step: int, options: TrainConfig) -> float:
    """Return the factor of the learning rate at a step, from 0: linear warm-up, then the schedule.

    >>> [round(rate(step, TrainConfig(steps=6, warmup_steps=2)), 2) for step in range(6)]
    [0.5, 1.0, 1.0, 0.85, 0.5, 0.15]
    """
    warmup = options.warmup_steps
    if step < warmup:
        return (step + 1) / warmup
    done = (step - warmup) / (options.steps - warmup)
    if options.schedule == "step":
        return 0.1 ** ((step >= options.steps / 2) + (step >= options.steps * 3 / 4))
    return (1 + math.cos(math.pi * done)) / 2 if options.schedule == "cosine" else 1.0


def _train_steps(
    training: Training,
    forward: nn.Module,
    batches_of: Callable[[int], Sequence[Batch]],
    loss: Loss,
    options: TrainConfig,
    until: int,
) -> dict[str, float]:
    """Train up to a step; return the means of loss and terms.

    The loss of a step is that of all its batches as one: a sum over their tokens, divided by the
    sum of all weights.
    """
    training.student.train()
    found: dict[str, list[Tensor]] = {}
    while training.step < until:
        for group in training.optimizer.param_groups:
            group["lr"] = options.lr * rate(training.step, options)
        batches = batches_of(training.step)
        total = sum(batch.total for batch in batches) or 1.0  # the loss is then 0
        training.optimizer.zero_grad(set_to_none=True)
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(batches, 1):
            batch = batch.to(training.device)
            with autocast(training.device, training.precision):
                logits = take_logits(forward(batch.inputs), "student")
            check_graph(logits, "student_logits")
            terms = loss(logits, batch, total)
            if number < len(batches):
                training.scaler.scale(terms["loss"]).backward()  # type: ignore[no-untyped-call]
            else:
                descend(training, terms["loss"], options.clip_grad)
            for name, term in terms.items():
                sums[name] = term.detach() + sums[name] if name in sums else term.detach()
        for name, value in sums.items():
            found.setdefault(name, []).append(value)
        training.step += 1
        if training.step % CHECK_STEPS == 0:
            check_finite(torch.stack(found["loss"]), training.epoch + 1)
    means = {name: torch.stack(values) for name, values in found.items()}
    check_finite(means["loss"], training.epoch + 1)
    return {name: float(values.mean()) for name, values in means.items()}


def measure(task: TextNetworks, network: nn.Module) -> dict[str, float]:
    """Return val_nll (nats a token), val_token_accuracy, of examples also val_exact_match.

    Raises:
        NonFiniteLossError: The validation loss is not finite.
    """
    tokens = task.data.splits["val"]
    nll, hits = 0.0, 0
    for logits, labels in task.run(network, tokens, range(tokens.windows)):
        nll += float(F.cross_entropy(logits, labels, reduction="sum", ignore_index=IGNORED))
        hits += int((logits.argmax(dim=-1) == labels).sum())
    if not math.isfinite(nll):
        raise NonFiniteLossError(
            f"validation loss must be finite, got {nll}: lower train.lr or set train.clip_grad"
        )
    count = len(tokens.scored)
    found = {"val_nll": nll / count, "val_token_accuracy": hits / count}
    return found | measure_matches(task.data, "val", network)
