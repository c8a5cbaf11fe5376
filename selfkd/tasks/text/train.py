"""Training of a language model as the config says, token by token."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfkd.config import TrainConfig
from selfkd.distill.outputs import check_graph, take_logits
from selfkd.errors import NonFiniteLossError
from selfkd.losses.sequences import SampledTargets, sequence_terms
from selfkd.losses.sparse import SparseLogits
from selfkd.results import Row
from selfkd.soft_targets.store import SoftTargets, open_store
from selfkd.tasks.common import make_fresh, optimizer_of
from selfkd.tasks.text.data import IGNORED, Tokens
from selfkd.tasks.text.networks import TextNetworks
from selfkd.training.fit import (
    Training,
    autocast,
    check_finite,
    descend,
    make_average,
)
from selfkd.training.trial import Trial

CHUNK = 256
"""Tokens whose loss is computed at once."""
CHECK_STEPS = 100  # steps between two checks of the loss, which on a GPU wait for it

Loss = Callable[[Tensor, Tensor, Tensor], dict[str, Tensor]]
"""Function from logits, labels and rows of windows to the loss and its terms by name."""


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
    options, data = task.config.train, task.data.splits["train"]
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
    loss = _make_loss(task, trial)
    order = Order(data.windows, trial.seed)
    forward = cast(nn.Module, torch.compile(student)) if options.compile else student
    begun = time.perf_counter() - training.seconds
    try:
        for part in range(training.epoch + 1, options.epochs + 1):
            until = options.steps * part // options.epochs
            terms = _train_steps(training, forward, data, order, loss, options, until)
            measured = measure(task, training.best)
            training.epoch, training.seconds = part, time.perf_counter() - begun
            row: Row = {
                "epoch": part,
                **terms,
                "lr": float(training.optimizer.param_groups[0]["lr"]),
                **measured,
                "seconds": training.seconds,
            }
            unfinished = part < options.epochs
            if not unfinished:
                row["hash"] = task.save(trial.path, training.best, trial.model, facts)
                row["checkpoint"] = trial.path.name
            trial.progress.reached(row, training.state_dict() if unfinished else None)
            yield row
    except NonFiniteLossError as error:
        raise NonFiniteLossError(f"{trial.stage.replace('-', ' ')}: {error}") from None


class Order:
    """Windows in random order, pass after pass: a function of seed and position alone.

    Args:
        windows: Number of windows.
        seed: Seed of the order.

    >>> order = Order(4, seed=0)
    >>> sorted(order(0, 4).tolist()), order(2, 4).tolist() == order(0, 6).tolist()[2:]
    ([0, 1, 2, 3], True)
    """

    def __init__(self, windows: int, seed: int) -> None:
        self._windows, self._seed = windows, seed
        self._passes: dict[int, Tensor] = {}

    def __call__(self, start: int, count: int) -> Tensor:
        """Return the numbers of so many windows from a position of the endless order on."""
        first, last = start // self._windows, (start + count - 1) // self._windows
        numbers = range(first, last + 1)
        self._passes = {number: self._pass(number) for number in numbers}
        found = torch.cat([self._passes[number] for number in numbers])
        return found[start - first * self._windows :][:count]

    def _pass(self, number: int) -> Tensor:
        if number in self._passes:
            return self._passes[number]
        seed = (self._seed * 1_000_003 + number) % 2**63
        return torch.randperm(self._windows, generator=torch.Generator().manual_seed(seed))


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
    data: Tokens,
    order: Order,
    loss: Loss,
    options: TrainConfig,
    until: int,
) -> dict[str, float]:
    """Train up to a step; return the means of loss and terms."""
    training.student.train()
    found: dict[str, list[Tensor]] = {}
    size, device = options.batch_size, training.device
    while training.step < until:
        for group in training.optimizer.param_groups:
            group["lr"] = options.lr * rate(training.step, options)
        windows = order(training.step * size, size)
        with autocast(device, training.precision):
            logits = take_logits(forward(data.inputs(windows).to(device)), "student")
        check_graph(logits, "student_logits")
        terms = loss(logits, data.labels_of(windows).to(device), data.rows(windows))
        training.optimizer.zero_grad(set_to_none=True)
        descend(training, terms["loss"], options.clip_grad)
        for name, term in terms.items():
            found.setdefault(name, []).append(term.detach())
        training.step += 1
        if training.step % CHECK_STEPS == 0:
            check_finite(torch.stack(found["loss"]), training.epoch + 1)
    means = {name: torch.stack(values) for name, values in found.items()}
    check_finite(means["loss"], training.epoch + 1)
    return {name: float(values.mean()) for name, values in means.items()}


def measure(task: TextNetworks, network: nn.Module) -> dict[str, float]:
    """Return val_nll (nats a token) and val_token_accuracy (fraction of the tokens).

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
    return {"val_nll": nll / count, "val_token_accuracy": hits / count}


def _make_loss(task: TextNetworks, trial: Trial) -> Loss:
    distill, smoothing = task.config.distill, task.config.train.label_smoothing
    teachers = trial.teachers
    if not teachers:
        return partial(_label_loss, smoothing=smoothing)
    weights = None
    if len(teachers) > 1 and "weight" in teachers[0]:
        weights = [row["weight"] for row in teachers]
    stored = open_store(
        trial.targets,
        [member["hash"] for member in teachers],
        data=task.data_key,
        average=distill.average,
        weights=weights,
    )
    # samples of all members are one set, in which these weights are
    separate = len(teachers) > 1 and distill.average == "probabilities" and not stored.samples

    def loss(logits: Tensor, labels: Tensor, rows: Tensor) -> dict[str, Tensor]:
        teacher = token_targets(stored, rows).to(logits.device)
        terms = sequence_terms(
            logits,
            teacher,
            labels,
            temperature=distill.temperature,
            alpha=distill.alpha,
            label_smoothing=smoothing,
            average="probabilities",
            weights=weights if separate else None,
            chunk=CHUNK,
        )
        return terms._asdict()

    return loss


def _label_loss(
    logits: Tensor, labels: Tensor, rows: Tensor, *, smoothing: float
) -> dict[str, Tensor]:
    flat, labels = logits.flatten(0, 1).float(), labels.flatten()
    loss = F.cross_entropy(flat, labels, ignore_index=IGNORED, label_smoothing=smoothing)
    return {"loss": loss}


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
