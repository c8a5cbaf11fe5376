"""Loss of a batch of tokens: on labels, or distilled from teachers that are cached or run live."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from selfkd.distill.outputs import take_logits
from selfkd.losses.moving import send, valid_rows
from selfkd.losses.sequences import TokenTeacher, sequence_terms
from selfkd.soft_targets.joined import Rows, open_joined
from selfkd.soft_targets.resident import resident
from selfkd.soft_targets.tokens import gathered
from selfkd.soft_targets.transforms import (
    ConfidenceWeighted,
    Transform,
    VirtualTargets,
    transform_targets,
)
from selfkd.tasks.common import mixes_transfer, teacher_weights
from selfkd.tasks.text.batches import Batch
from selfkd.tasks.text.data import IGNORED
from selfkd.tasks.text.networks import TextNetworks
from selfkd.tasks.text.terms import FurtherTerms, Targets, load_teachers
from selfkd.training.predict import autocast
from selfkd.training.trial import Trial

CHUNK = 256
"""Tokens whose loss is computed at once, at least."""
CHUNK_VALUES = 2**20
"""Logits whose loss is computed at once, where these are of more tokens."""

Loss = Callable[[Tensor, Batch, float], dict[str, Tensor]]
"""Function from logits, their batch and the divisor of sums to the loss and its terms by name."""
Cached = Callable[[Tensor, int], Rows]
"""Function from rows and a view to cached logits."""


def make_loss(
    task: TextNetworks,
    trial: Trial,
    transform: Transform = "none",
    further: FurtherTerms | None = None,
) -> Loss:
    """Return the loss of a trial.

    Args:
        task: Text and networks.
        trial: Student and its teachers.
        transform: Transform of the teacher logits.
        further: Further terms of the loss.

    Raises:
        ValueError: The transform needs all logits, and they are not cached.
        FileNotFoundError: The logits of a teacher are not cached.
    """
    distill, smoothing = task.config.distill, task.config.train.label_smoothing
    teachers, text = trial.teachers, task.data.splits["train"]
    weights = teacher_weights(teachers)
    average, last, temperature = distill.average, len(text) - 1, distill.temperature
    if transform == "virtual":
        labels = text.labels.clamp(min=0)  # what is not predicted does not count
        targets = _from_rows(VirtualTargets(labels, classes=task.data.vocabulary), last)
    elif not teachers or distill.mode == "traces":  # whose text are the labels
        return partial(_label_loss, smoothing)
    elif distill.runs_teacher:
        targets = _live_targets(task, further.teachers if further else load_teachers(task, trial))
    else:
        transfer = task.transfer if mixes_transfer(trial, transform) else None
        stored = open_joined(
            trial.targets,
            [row["hash"] for row in teachers],
            data=task.data_key,
            transfer=None if transfer is None else task.key_of(transfer.fingerprint),
            average=average,
            weights=weights,
        )
        last += 0 if transfer is None else len(transfer.tokens)
        if average == "logits" or stored.samples:  # by the store, once
            average, weights = "probabilities", None
        averaging: dict[str, Any] = {"average": average, "weights": weights}
        if transform == "confidence":
            weighted = ConfidenceWeighted(stored, **averaging, label_smoothing=smoothing)
            return partial(_confidence_loss, weighted)
        cached: Cached = resident(stored, task.device) if transform == "none" else stored
        if transform != "none":  # of the average
            cached, temperature = transform_targets(
                stored,
                transform,
                text.labels,
                classes=task.data.vocabulary,
                temperature=temperature,
                **averaging,
                seed=trial.seed,
            )
            weights = None
        targets = _from_rows(cached, last)
    return partial(
        _soft_loss,
        targets,
        further,
        {
            "temperature": temperature,
            "alpha": distill.alpha,
            "label_smoothing": smoothing,
            "average": average,
            "weights": weights,
            "divergence": distill.divergence,
        },
    )


def _soft_loss(
    targets: Targets,
    further: FurtherTerms | None,
    settings: Mapping[str, Any],
    logits: Tensor,
    batch: Batch,
    total: float,
) -> dict[str, Tensor]:
    """Return the loss and its terms; of what has no label, the soft term and further ones alone.

    Where some windows of a step have none, the hard term is the mean over the labelled tokens, the
    soft term that over all:

        (1 - alpha) hard / (share total) + alpha soft / total = ((1 - a) hard + a soft) / n
        n = total / ((1 - alpha) / share + alpha)    a = alpha n / total
    """
    written, alpha, divisor = batch.rows is None, settings["alpha"], total
    teacher = targets(batch) if further is None or written else further.run(targets, batch)
    soft_only = written or not batch.labelled
    factors = {"loss": alpha if soft_only and not written else 1.0}
    if soft_only:  # what the student has written is no label
        settings = {**settings, "alpha": 1.0}
    elif 0 < batch.share < 1:
        rescaled = 1 / ((1 - alpha) / batch.share + alpha)
        settings = {**settings, "alpha": alpha * rescaled}
        factors = {"hard_loss": rescaled / batch.share, "soft_loss": rescaled}
        divisor = total * rescaled
    chunk = max(CHUNK, CHUNK_VALUES // logits.shape[-1])

    def terms_of(total: float, mask: Tensor | None) -> dict[str, Tensor]:
        return sequence_terms(
            logits, teacher, batch.labels, mask=mask, normalizer=total, chunk=chunk, **settings
        )._asdict()

    terms = _by_weight(batch, divisor, terms_of)
    names = ("loss", "soft_loss") if soft_only else tuple(terms)
    terms = {name: terms[name] * factors.get(name, 1.0) for name in names}
    if further is not None and batch.total and not written:
        values = further(logits, teacher, batch)
        return further.added(terms, values, batch.total / total)
    return terms


def _by_weight(
    batch: Batch, total: float, terms_of: Callable[[float, Tensor | None], dict[str, Tensor]]
) -> dict[str, Tensor]:
    """Return the sums of terms over tokens of each weight, of which there are few.

    Args:
        batch: Windows that are trained on.
        total: Divisor of sums.
        terms_of: Function from the divisor and the mask of tokens that count, or None, to terms.
    """
    if batch.weights is None:
        return terms_of(total, None)
    found: dict[str, Tensor] = {}
    for weight in torch.unique(batch.weights).tolist():
        if weight > 0:
            terms = terms_of(total / weight, batch.weights == weight)
            found = {name: term + found.get(name, 0) for name, term in terms.items()}
    return found


def _label_loss(smoothing: float, logits: Tensor, batch: Batch, total: float) -> dict[str, Tensor]:
    losses = partial(
        F.cross_entropy,
        logits.flatten(0, 1).float(),
        send(batch.labels.flatten(), logits.device),
        ignore_index=IGNORED,
        label_smoothing=smoothing,
    )
    if batch.weights is None:
        return {"loss": losses(reduction="sum") / total}
    weights = send(batch.weights.flatten(), logits.device)
    return {"loss": losses(reduction="none") @ weights / total}


def _confidence_loss(
    weighted: ConfidenceWeighted, logits: Tensor, batch: Batch, total: float
) -> dict[str, Tensor]:
    """Return the confidence-weighted loss of the tokens that are trained on."""
    if batch.rows is None:
        raise ValueError("target_transform must be none with distill.on_policy, got confidence")
    rows = batch.rows

    def terms_of(total: float, mask: Tensor | None) -> dict[str, Tensor]:
        valid = batch.valid if mask is None else mask & batch.valid
        labels = send(batch.labels[valid], logits.device)
        terms = weighted(valid_rows(logits, valid), labels, index=rows[valid])
        share = int(valid.sum()) / total
        return {name: share * term for name, term in terms.items()}

    return _by_weight(batch, total, terms_of)


def _live_targets(task: TextNetworks, networks: Sequence[nn.Module]) -> Targets:
    """Return a function that runs teachers on a batch."""

    @torch.no_grad()
    def targets(batch: Batch) -> Tensor:
        with autocast(task.device, task.precision):
            found = [take_logits(network(batch.inputs), "teacher") for network in networks]
        return found[0] if len(found) == 1 else torch.stack(found)

    return targets


def _from_rows(cached: Cached, last: int) -> Targets:
    """Return a function from a batch to what is cached of its rows.

    Args:
        cached: Cached logits by row.
        last: Last row, which padding is given; that does not matter.
    """

    def targets(batch: Batch) -> TokenTeacher:
        if batch.rows is None:
            raise ValueError("distill.live must be true with distill.on_policy above 0, got false")
        found = cached(batch.rows.flatten().clamp(max=last), 0)
        together: Rows = gathered(found, batch.rows.shape)
        device = batch.inputs.device
        return send(together, device) if isinstance(together, Tensor) else together.to(device)

    return targets
