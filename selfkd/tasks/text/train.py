"""Training of a language model as the config says, token by token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfkd.config import TrainConfig
from selfkd.distill.outputs import check_graph, take_logits
from selfkd.errors import NonFiniteLossError
from selfkd.losses.sequences import SampledTargets, TokenTeacher, sequence_terms
from selfkd.losses.sparse import SparseLogits
from selfkd.results import Row
from selfkd.soft_targets.store import SoftTargets, open_store
from selfkd.tasks.common import make_fresh, optimizer_of
from selfkd.tasks.text.batches import Batch, TrainingText
from selfkd.tasks.text.data import IGNORED
from selfkd.tasks.text.evaluate import measure_matches
from selfkd.tasks.text.networks import TextNetworks
from selfkd.tasks.text.on_policy import Writer, is_on_policy
from selfkd.tasks.text.write import training_text
from selfkd.training.fit import (
    Training,
    autocast,
    check_finite,
    descend,
    make_average,
)
from selfkd.training.trial import Trial

CHUNK = 256
"""Tokens whose loss is computed at once, at least."""
CHUNK_VALUES = 2**20
"""Logits whose loss is computed at once, where these are of more tokens."""
CHECK_STEPS = 100  # steps between two checks of the loss, which on a GPU wait for it


Loss = Callable[[Tensor, Batch, float], dict[str, Tensor]]
"""Function from logits, their batch and the divisor of sums to the loss and its terms by name."""
Targets = Callable[[Batch], TokenTeacher]
"""Function from a batch to the teacher's logits of it."""


def train_language_model(
    task: TextNetworks,
    trial: Trial,
    *,
    start: Mapping[str, Any] | None = None,
    transform: str = "none",
) -> Iterator[Row]:
    """Train a language model; yield a row after each of `train.epochs` equal parts of the steps.

    Args:
        task: Text and networks.
        trial: Student and its teachers.
        start: `checkpoint` to start the weights from, or `seed` of the initialisation.
        transform: Transform of the teacher logits; none only.
    """
    if transform != "none":
        raise ValueError(f"target_transform must be none with task text, got {transform}")
    options, data = task.config.train, training_text(task, trial)
    distill = task.config.distill
    student = make_fresh(task, trial, start or {})
    training = Training(
        student=student,
        optimizer=optimizer_of(student, options),
        average=make_average(student, decay=options.ema) if options.ema is not None else None,
        generator=torch.Generator(),  # the order is a function of seed and step
        device=task.device,
        precision=options.amp,
    )
    if (state := trial.checkpoint) is not None:
        training.load_state_dict(state)
        trial.progress.state = None
        yield from [dict(row) for row in trial.progress.rows]
    facts = {"stage": trial.stage, "seed": trial.seed}
    loss = make_loss(task, trial)
    text, writer = TrainingText(data, options, trial.seed), None
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
                row["hash"] = task.save(trial.path, training.best, trial.model, facts)
                row["checkpoint"] = trial.path.name
            now = {**training.state_dict(), **({"writer": writer.state_dict()} if writer else {})}
            trial.progress.reached(row, now if unfinished else None)
            yield row
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{trial.stage.replace('-', ' ')}: {error}") from None


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


def make_loss(task: TextNetworks, trial: Trial) -> Loss:
    distill, smoothing = task.config.distill, task.config.train.label_smoothing
    teachers = trial.teachers
    if not teachers or distill.mode == "traces":  # whose text are the labels
        return partial(_label_loss, smoothing=smoothing)
    weights = None
    if len(teachers) > 1 and "weight" in teachers[0]:
        weights = [row["weight"] for row in teachers]
    average = distill.average
    if distill.live:
        targets = _live_targets(task, [row["checkpoint"] for row in teachers])
    else:
        stored = open_store(
            trial.targets,
            [row["hash"] for row in teachers],
            data=task.data_key,
            average=average,
            weights=weights,
        )
        targets = partial(_cached_targets, stored)
        if average == "logits" or stored.samples:  # by the store, once
            average, weights = "probabilities", None

    def terms_of(
        logits: Tensor,
        labels: Tensor,
        teacher: TokenTeacher,
        total: float,
        *,
        mask: Tensor | None = None,
        alpha: float = distill.alpha,
    ) -> dict[str, Tensor]:
        terms = sequence_terms(
            logits,
            teacher,
            labels,
            temperature=distill.temperature,
            alpha=alpha,
            label_smoothing=smoothing,
            average=average,
            weights=weights,
            mask=mask,
            normalizer=total,
            divergence=distill.divergence,
            chunk=max(CHUNK, CHUNK_VALUES // logits.shape[-1]),
        )
        return terms._asdict()

    def loss(logits: Tensor, batch: Batch, total: float) -> dict[str, Tensor]:
        teacher = targets(batch)
        if batch.rows is None:  # what the student has written is no label
            terms = terms_of(logits, batch.labels, teacher, total, alpha=1.0)
            return {name: terms[name] for name in ("loss", "soft_loss")}
        if batch.weights is None:
            return terms_of(logits, batch.labels, teacher, total)
        found: dict[str, Tensor] = {}
        for weight in torch.unique(batch.weights).tolist():
            if weight > 0:  # few weights, each of many tokens
                mask = batch.weights == weight
                terms = terms_of(logits, batch.labels, teacher, total / weight, mask=mask)
                found = {name: term + found.get(name, 0) for name, term in terms.items()}
        return found

    return loss


def _label_loss(
    logits: Tensor, batch: Batch, total: float, *, smoothing: float
) -> dict[str, Tensor]:
    losses = partial(
        F.cross_entropy,
        logits.flatten(0, 1).float(),
        batch.labels.flatten(),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
    )
    if batch.weights is None:
        return {"loss": losses(reduction="sum") / total}
    return {"loss": losses(reduction="none") @ batch.weights.flatten() / total}


def _live_targets(task: TextNetworks, checkpoints: Sequence[str]) -> Targets:
    """Return a function that runs teachers on a batch."""
    with torch.random.fork_rng(devices=[]):  # a resumed training has restored its state
        networks = [task.load(path)[0].eval().requires_grad_(False) for path in checkpoints]

    @torch.no_grad()
    def targets(batch: Batch) -> Tensor:
        with autocast(task.device, task.config.train.amp):
            found = [take_logits(network(batch.inputs), "teacher") for network in networks]
        return found[0] if len(found) == 1 else torch.stack(found)

    return targets


def _cached_targets(stored: SoftTargets, batch: Batch) -> TokenTeacher:
    if batch.rows is None:
        raise ValueError("distill.live must be true with distill.on_policy above 0, got false")
    return token_targets(stored, batch.rows).to(batch.inputs.device)


def token_targets(stored: SoftTargets, rows: Tensor) -> Tensor | SparseLogits | SampledTargets:
    """Return the cached logits of windows; those of padding are of the last row, and no matter.

    Args:
        stored: Cached logits by row.
        rows: Rows of windows, `[batch, length]`.

    Returns:
        `[batch, length, ...]`, or `[members, batch, length, ...]` of several teachers.
    """
    found = stored(rows.flatten().clamp(max=stored.images - 1), 0)
    largest = found.values if isinstance(found, SparseLogits) else found
    axis = largest.ndim - 2 if isinstance(largest, Tensor) else 0  # that of the rows

    def shape(tensor: Tensor) -> Tensor:
        return tensor.reshape(*tensor.shape[:axis], *rows.shape, *tensor.shape[axis + 1 :])

    return shape(found) if isinstance(found, Tensor) else found.map(shape)
