"""Time of each loss, forward and backward, beside torchdistill's of the same name.

    pip install --no-deps torchdistill
    OMP_NUM_THREADS=1 python -m tests.benchmarks.losses [--only dist_loss]

Both run turn by turn in one process; medians over the rounds. Where torchdistill has no such loss,
ours stands alone. Which constants multiply a loss differs, which costs nothing.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torchdistill
from torch import Tensor, nn
from torchdistill.losses import mid_level

from selfkd.losses import distillation_loss, features, logits, relations

Loss = Callable[..., Tensor]
T = 4.0
SHAPES = ((128, 10), (128, 100), (256, 1000))
MAPS = ((64, 64, 16), (64, 256, 8))
"""Batch, channels, height and width."""
IMAGES, NEGATIVES = 50_000, 4096
OUT = {"path": "out", "io": "output"}
IO = ("out", "output", "out", "output")
SECONDS = 2.0
"""For each case and shape; three rounds at least."""


@dataclass(frozen=True)
class Case:
    """A loss of ours and, if there is one, the same of torchdistill."""

    name: str
    ours: Loss
    theirs: Loss | None = None
    inputs: Callable[..., tuple[Tensor, ...]] = lambda batch, classes: make_logits(batch, classes)
    """Makes the arguments of both, of a shape; the gradient with respect to the first is taken."""
    shapes: tuple[tuple[int, ...], ...] = SHAPES


def make_logits(batch: int, classes: int) -> tuple[Tensor, Tensor, Tensor]:
    """Student logits, teacher logits, labels."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(batch, classes, generator=generator, requires_grad=True)
    teacher = torch.randn(batch, classes, generator=generator)
    return student, teacher, torch.randint(classes, (batch,), generator=generator)


def make_maps(batch: int, channels: int, size: int) -> tuple[Tensor, Tensor]:
    """Feature maps of student and teacher, of as many channels."""
    shape = (batch, channels, size, size)
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(shape, generator=generator, requires_grad=True)
    return student, torch.randn(shape, generator=generator)


def our_crd() -> Loss:
    """With drawing; without the update, which follows the backward pass."""
    memory = features.ContrastiveMemory(IMAGES, 128)

    def loss(student: Tensor, teacher: Tensor, *_: Tensor) -> Tensor:
        contrast = memory.draw(torch.arange(len(student)), negatives=NEGATIVES)
        return features.crd_loss(student, teacher, memory, contrast)

    return loss


def unlabelled(loss: Loss, **settings: Any) -> Loss:
    """The loss as a function of student, teacher and labels it does not use."""
    return lambda student, teacher, *_: loss(student, teacher, **settings)


def theirs(module: nn.Module) -> Loss:
    """A module of torchdistill as a function of student, teacher and perhaps labels."""
    return lambda student, teacher, *labels: module(
        {"out": {"output": student}}, {"out": {"output": teacher}}, *labels
    )


def rkd(distance: float, angle: float) -> Loss:
    return theirs(mid_level.RKDLoss("out", "out", distance, angle, "mean"))


CASES = [
    Case(
        "distillation_loss",
        partial(distillation_loss, temperature=T, alpha=0.9),
        theirs(mid_level.KDLoss(*IO, temperature=T, alpha=0.1, beta=0.9)),
    ),
    Case("soft_cross_entropy", unlabelled(logits.soft_cross_entropy, temperature=T)),
    Case("reverse_kl", unlabelled(logits.reverse_kl, temperature=T)),
    Case("jensen_shannon", unlabelled(logits.jensen_shannon, temperature=T)),
    Case("logit_mse", unlabelled(logits.logit_mse), unlabelled(nn.MSELoss())),
    Case("logit_mse centred", unlabelled(logits.logit_mse, centre=True)),
    Case("dkd_loss", partial(logits.dkd_loss, temperature=T)),
    Case(
        "dist_loss",
        unlabelled(logits.dist_loss, temperature=T),
        theirs(mid_level.DISTLoss(*IO, tau=T)),
    ),
    Case(
        "standardized_loss",
        unlabelled(logits.standardized_loss, temperature=T),
        unlabelled(theirs(mid_level.LogitStdKDLoss(*IO, temperature=T, alpha=0))),
    ),
    Case("hard_teacher_loss", unlabelled(logits.hard_teacher_loss)),
    Case("confidence_weighted", logits.confidence_weighted_loss),
    Case("rkd_distance", unlabelled(relations.rkd_distance), rkd(1.0, 0.0)),
    Case("rkd_angle", unlabelled(relations.rkd_angle), rkd(0.0, 1.0)),
    Case(
        "attention_transfer",
        features.attention_transfer,
        theirs(mid_level.ATLoss({"": dict.fromkeys(("student", "teacher"), OUT)})),
        make_maps,
        MAPS,
    ),
    Case(
        "similarity_preserving",
        features.similarity_preserving,
        theirs(mid_level.SPKDLoss("out", "out", "batchmean")),
        make_maps,
        MAPS,
    ),
    Case("pkt", unlabelled(features.pkt), theirs(mid_level.PKTLoss(*IO))),
    Case("crd_loss", our_crd(), shapes=((64, 128),)),
]


def seconds(loss: Loss, inputs: tuple[Tensor, ...]) -> float:
    """Return how long one step took."""
    start = time.perf_counter()
    torch.autograd.grad(loss(*inputs), inputs[0])
    return time.perf_counter() - start


def medians(case: Case, shape: tuple[int, ...]) -> list[float]:
    """Return the milliseconds of ours and, if there is one, of theirs."""
    inputs = case.inputs(*shape)
    losses = [loss for loss in (case.ours, case.theirs) if loss is not None]
    taken: list[list[float]] = [[] for _ in losses]
    for loss in losses:
        seconds(loss, inputs)
    start = time.perf_counter()
    while len(taken[0]) < 3 or time.perf_counter() - start < SECONDS:
        for loss, times in zip(losses, taken, strict=True):
            times.append(seconds(loss, inputs))
    return [1e3 * statistics.median(times) for times in taken]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, torchdistill {torchdistill.__version__}, 1 thread, float32")
    print(f"{'loss':20} {'shape':>12} {'ours ms':>9} {'theirs ms':>9} {'ours/theirs':>11}")
    for case in CASES:
        for shape in case.shapes if only in case.name else ():
            ours, *other = medians(case, shape)
            beside = f"{other[0]:9.3f} {ours / other[0]:10.2f}x" if other else f"{'-':>9}"
            print(f"{case.name:20} {' x '.join(map(str, shape)):>12} {ours:9.3f} {beside}")


if __name__ == "__main__":
    main()
