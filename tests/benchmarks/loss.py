"""Time and memory of the distillation loss against the plain PyTorch expression.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.loss

Both run turn by turn in one process: forward and backward at batch 256, float32, T = 4. Time: the
median and the least over the rounds. Extra memory: the peak of bytes allocated during a step, as
the profiler records every allocation and release, less the gradient that is returned.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from selfkd.losses import distillation_loss

BATCH, TEMPERATURE, ALPHA = 256, 4.0, 0.9
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def plain(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The expression that tutorials give."""
    soft = F.kl_div(
        F.log_softmax(student / TEMPERATURE, -1),
        F.log_softmax(teacher / TEMPERATURE, -1),
        log_target=True,
        reduction="batchmean",
    )
    return (1 - ALPHA) * F.cross_entropy(student, labels) + ALPHA * TEMPERATURE**2 * soft


def ours(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """What selfkd computes."""
    return distillation_loss(student, teacher, labels, temperature=TEMPERATURE, alpha=ALPHA)


def gradient(loss: Loss, student: Tensor, teacher: Tensor, labels: Tensor, scale: float) -> Tensor:
    """One step: the loss, times `scale` as in gradient accumulation, and its gradient."""
    value = loss(student, teacher, labels)
    return torch.autograd.grad(value if scale == 1 else value * scale, student)[0]


def peak_extra_bytes(step: Callable[[], Tensor]) -> int:
    """Return the most bytes allocated at once in `step`, less its result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = step()
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - result.nbytes


def compare(classes: int, rounds: int, scale: float) -> str:
    """Return one line: seconds and bytes of both, and their ratios."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randn(BATCH, classes, generator=generator, requires_grad=True)
    teacher = torch.randn(BATCH, classes, generator=generator)
    labels = torch.randint(classes, (BATCH,), generator=generator)
    steps = [partial(gradient, loss, student, teacher, labels, scale) for loss in (plain, ours)]
    torch.testing.assert_close(steps[0](), steps[1](), rtol=1e-4, atol=1e-7)
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for step, taken in zip(steps, seconds, strict=True):
            start = time.perf_counter()
            step()
            taken.append(time.perf_counter() - start)
    (plain_median, our_median), (plain_least, our_least) = (
        [1e3 * reduce(taken) for taken in seconds] for reduce in (statistics.median, min)
    )
    plain_bytes, our_bytes = (peak_extra_bytes(step) for step in steps)
    return (
        f"{classes:7} {scale:6} {plain_median:9.2f} {our_median:8.2f} "
        f"{plain_median / our_median:6.2f}x {plain_least / our_least:6.2f}x "
        f"{plain_bytes / 2**20:10.2f} {our_bytes / 2**20:8.2f} {our_bytes / plain_bytes:6.2f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {threads} thread(s), batch {BATCH}, T {TEMPERATURE}")
    print("classes  scale  plain ms  ours ms  median   least  plain MiB ours MiB  ratio")
    for classes, rounds in ((10, 500), (100, 500), (1_000, 200), (32_000, 15)):
        for scale in (1, 0.5):
            print(compare(classes, rounds, scale))


if __name__ == "__main__":
    main()
