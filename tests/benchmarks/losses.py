"""Time of each loss, forward and backward, beside torchdistill's of the same name.

    pip install -e '.[bench]'
    OMP_NUM_THREADS=1 python -m tests.benchmarks.losses [--only dist_loss] [--seconds 2]

Both run turn by turn in one process, on one thread; medians over the rounds of the processor's
time, so that other work on the machine counts less, and the ratio of the least times. Where
torchdistill has no such loss, ours stands alone. Which constants multiply a loss differs, which
costs nothing. Losses that torchdistill takes from PyTorch go through its wrapper, as they do in its
training.
"""

from __future__ import annotations

import argparse
import ctypes
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
from selfkd.losses.contrast import ContrastiveMemory, crd_loss

Loss = Callable[..., Tensor]
T = 4.0
SHAPES = ((128, 10), (128, 100), (256, 1000))
MAPS = ((64, 64, 16), (64, 256, 8))
"""Batch, channels, height and width."""
IMAGES, NEGATIVES = 50_000, 4096
OUT = {"path": "out", "io": "output"}
IO = ("out", "output", "out", "output")
TOKENS = ((16, 64, 312), (8, 128, 768))
"""Batch, tokens, width."""


@dataclass(frozen=True)
class Case:
    """A loss of ours and, if there is one, the same of torchdistill."""

    name: str
    ours: Loss
    theirs: Loss | None = None
    inputs: Callable[..., tuple[Tensor, ...]] = lambda batch, classes: make_logits(batch, classes)
    """Makes the arguments of both, of a shape; the gradient with respect to the first is taken."""
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    after: Callable[..., None] = lambda *inputs: None
    """What ours does after the backward pass."""


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


def make_tokens(batch: int, tokens: int, width: int) -> tuple[Tensor, Tensor]:
    """Hidden states of student and teacher."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(batch, tokens, width, generator=generator, requires_grad=True)
    return student, torch.randn(batch, tokens, width, generator=generator)


def make_embeddings(batch: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of student and teacher, and which images they are compared with."""
    student, teacher, _ = make_logits(batch, width)
    contrast = torch.randint(IMAGES, (batch, 1 + NEGATIVES))
    contrast[:, 0] = torch.arange(batch)
    return student, teacher, contrast


def our_crd() -> Case:
    """With the update; without drawing, which torchdistill leaves to the data loader."""
    memory = ContrastiveMemory(IMAGES, 128)

    def loss(student: Tensor, teacher: Tensor, contrast: Tensor) -> Tensor:
        return crd_loss(student, teacher, memory, contrast)

    return Case("crd_loss", loss, their_crd(), make_embeddings, ((64, 128),), memory.update)


def their_crd() -> Loss:
    """With the rows normalised, as its `Normalizer4CRD` does, and the update."""
    module = mid_level.CRDLoss("out", "indices", "out", 128, IMAGES, NEGATIVES, IMAGES)

    def loss(student: Tensor, teacher: Tensor, contrast: Tensor) -> Tensor:
        indices = {"pos_idx": contrast[:, 0], "contrast_idx": contrast}
        student, teacher = (nn.functional.normalize(x) for x in (student, teacher))
        value: Tensor = module(
            {"out": {"output": student}, "indices": {"input": indices}},
            {"out": {"output": teacher}},
        )
        return value

    return loss


def their_cosine() -> Loss:
    """PyTorch's loss, with the target of ones that it wants."""
    module = nn.CosineEmbeddingLoss()

    def loss(student: Tensor, teacher: Tensor) -> Tensor:
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        value: Tensor = module(student, teacher, torch.ones(len(student)))
        return value

    return loss


def unlabelled(loss: Loss, **settings: Any) -> Loss:
    """The loss as a function of student, teacher and labels it does not use."""
    return lambda student, teacher, *_: loss(student, teacher, **settings)


def theirs(module: nn.Module) -> Loss:
    """A module of torchdistill as a function of student, teacher and perhaps labels."""
    return lambda student, teacher, *labels: module(
        {"out": {"output": student}}, {"out": {"output": teacher}}, *labels
    )


def wrapped(module: nn.Module) -> Loss:
    """A loss of PyTorch in torchdistill's wrapper."""
    ends = ({"is_from_teacher": of, "module_path": "out", "io": "output"} for of in (False, True))
    wrapper = mid_level.SimpleLossWrapper(
        module, **dict(zip(("input", "target"), ends, strict=True))
    )
    return lambda student, teacher, *_: theirs(wrapper)(student, teacher, None)


def their_layers(count: int) -> Loss:
    """The sum of as many losses."""
    loss = wrapped(nn.MSELoss())
    return lambda student, teacher: sum(loss(student, teacher) for _ in range(count))


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
    Case("logit_mse", unlabelled(logits.logit_mse), wrapped(nn.MSELoss())),
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
    Case("hint_loss", features.hint_loss, wrapped(nn.MSELoss()), make_maps, MAPS),
    Case(
        "hidden_state_loss",
        lambda student, teacher: features.hidden_state_loss([student] * 4, [teacher] * 8),
        their_layers(4),
        make_tokens,
        TOKENS,
    ),
    Case("cosine_embedding", features.cosine_embedding, their_cosine(), make_tokens, TOKENS),
    Case("pkt", unlabelled(features.pkt), theirs(mid_level.PKTLoss(*IO))),
    our_crd(),
]


def seconds(loss: Loss, inputs: tuple[Tensor, ...], after: Callable[..., None]) -> float:
    """Return how long one step took."""
    start = time.process_time()
    torch.autograd.grad(loss(*inputs), inputs[0])
    after(*inputs)
    return time.process_time() - start


def milliseconds(case: Case, shape: tuple[int, ...], limit: float) -> list[float]:
    """Return medians of milliseconds, and the least of them, three rounds at least.

    Of ours and, if there is one, of theirs: `[ours, theirs, least of ours, least of theirs]`.
    """
    inputs = case.inputs(*shape)
    steps = [(case.ours, case.after)]
    if case.theirs is not None:
        steps.append((case.theirs, lambda *inputs: None))
    taken: list[list[float]] = [[] for _ in steps]
    for loss, after in steps:
        seconds(loss, inputs, after)
    start = time.perf_counter()
    while len(taken[0]) < 3 or time.perf_counter() - start < limit:
        for (loss, after), times in zip(steps, taken, strict=True):
            times.append(seconds(loss, inputs, after))
    return [1e3 * reduce(times) for reduce in (statistics.median, min) for times in taken]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name contains this")
    parser.add_argument("--seconds", type=float, default=2.0, help="for each case and shape")
    options = parser.parse_args()
    torch.set_num_threads(1)
    # memory stays with the process: else a page fault counts for whom it happens to
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):  # glibc: no trimming, no mapping of large arrays
        libc.mallopt(-1, 2**30)
        libc.mallopt(-3, 2**30)
    print(f"torch {torch.__version__}, torchdistill {torchdistill.__version__}, 1 thread, float32")
    print(f"{'loss':21} {'shape':>13} {'ours ms':>9} {'theirs ms':>9} {'ratio':>11} {'least':>7}")
    for case in CASES:
        for shape in case.shapes if options.only in case.name else ():
            ours, *other = milliseconds(case, shape, options.seconds)
            beside = f"{'-':>9}"
            if case.theirs is not None:
                theirs_median, our_least, their_least = other
                beside = f"{theirs_median:9.3f} {ours / theirs_median:10.2f}x"
                beside += f" {our_least / their_least:6.2f}x"
            print(f"{case.name:21} {' x '.join(map(str, shape)):>13} {ours:9.3f} {beside}")


if __name__ == "__main__":
    main()
