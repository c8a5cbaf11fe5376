"""Further terms of the loss of images: made for a trial, and tried before one begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from selfkd.config import Config
from selfkd.distill.distiller import Distiller
from selfkd.distill.named_terms import make_terms
from selfkd.distill.teacher import Ensemble, Teacher
from selfkd.distill.terms import Term
from selfkd.tasks.common import try_each_term
from selfkd.tasks.images.networks import ImageNetworks


def terms_of(
    task: ImageNetworks, config: Config, *, weights: Sequence[float] | None, seed: int
) -> dict[str, Term]:
    """Return the further terms of the loss of a config.

    Args:
        task: Data and networks.
        config: Config of the student.
        weights: Weight of each teacher in their average; equal when None.
        seed: Seed of what a term draws.
    """
    distill = config.distill
    return make_terms(
        distill.terms,
        temperature=distill.temperature,
        average=distill.average,
        weights=weights,
        labels=task.data.train.labels,
        seed=seed,
    )


@torch.enable_grad()  # as in training, where each term must have a gradient
def try_terms(
    task: ImageNetworks,
    student: nn.Module,
    teachers: Sequence[Teacher],
    choices: Iterable[Sequence[Mapping[str, Any]]],
) -> None:
    """Compute terms, one after the other, of two training images.

    Args:
        task: Data and networks.
        student: Network that is trained.
        teachers: Networks that may teach it.
        choices: Lists of terms that it may have.

    Raises:
        ValueError: One cannot be computed; names it.
    """
    inputs, labels, index = task.two_images()

    def compute(own: Config, teacher: Teacher) -> None:
        distiller = Distiller(
            Ensemble([teacher]),
            terms=terms_of(task, own, weights=None, seed=0),
            student=student,
            example=inputs,
        )
        distiller(student(inputs), labels, inputs=inputs, index=index)
        distiller.detach()

    try_each_term(task.config, choices, teachers, compute)
