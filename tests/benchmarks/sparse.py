"""Time of the loss of the k largest logits of a teacher against that of all of them.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.sparse

Forward and backward on the CPU, float32, turn by turn in one process: processor time, the median
over the rounds of the loss of the k largest in milliseconds, and its ratio to the loss of all
logits. Of classifiers (`sparse_terms` and `distillation_terms`), of tokens (`sequence_terms`) and
of linear heads of width 256 (`linear_sequence_terms`).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from selfkd.losses import distillation_terms, sparse_terms, sparsify
from selfkd.losses.sequences import linear_sequence_terms, sequence_terms

WIDTH = 256
CLASSIFIERS = ((128, 10, 3), (128, 100, 10), (128, 1_000, 20), (128, 10_000, 50), (32, 50_000, 256))
TOKENS = ((2, 64, 32_000, 20), (2, 64, 32_000, 256))
SETTINGS: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0, "alpha": 0.5},
    {"temperature": 1.0, "alpha": 1.0},
    {"temperature": 4.0, "alpha": 0.0},
    {"temperature": 4.0, "alpha": 0.5},
    {"temperature": 4.0, "alpha": 0.5, "label_smoothing": 0.1},
    {"temperature": 4.0, "alpha": 1.0},
)
Step = Callable[[], object]


def steps(classes: int, k: int, rows: tuple[int, ...], members: int) -> Iterable[tuple[str, Any]]:
    """Yield kinds of loss, each with a function of settings that gives both steps."""
    generator = torch.Generator().manual_seed(0)
    student = (2 * torch.randn(*rows, classes, generator=generator)).requires_grad_()
    teacher = 2 * torch.randn(members, *rows, classes, generator=generator)
    teacher = teacher[0] if members == 1 else teacher
    labels = torch.randint(classes, rows, generator=generator)
    sparse = sparsify(teacher, k)

    def gradients(loss: Callable[..., Any], *inputs: Tensor, **settings: Any) -> None:
        torch.autograd.grad(loss(**settings).loss, inputs)

    def both(loss: Callable[..., Any], *inputs: Tensor, **settings: Any) -> list[Step]:
        return [
            partial(gradients, partial(loss, *inputs, target, labels), *inputs, **settings)
            for target in (teacher, sparse)
        ]

    if len(rows) == 1:
        yield (
            "rows",
            lambda **settings: [
                partial(gradients, partial(loss, student, target, labels), student, **settings)
                for loss, target in ((distillation_terms, teacher), (sparse_terms, sparse))
            ],
        )
        return
    yield "tokens", partial(both, sequence_terms, student)
    hidden = torch.randn(*rows, WIDTH, generator=generator, requires_grad=True)
    weight = (torch.randn(classes, WIDTH, generator=generator) / WIDTH**0.5).requires_grad_()
    yield "head", partial(both, linear_sequence_terms, hidden, weight)


def compare(dense: Step, sparse: Step, rounds: int) -> tuple[float, float]:
    """Return milliseconds of the sparse step, and the median of its ratios to the dense one."""
    seconds: list[tuple[float, float]] = []
    for _ in range(rounds + 1):
        taken = []
        for step in (dense, sparse):
            start = time.process_time()
            step()
            taken.append(time.process_time() - start)
        seconds.append((taken[0], taken[1]))
    seconds = seconds[1:]
    return (
        1e3 * statistics.median(sparse for _, sparse in seconds),
        statistics.median(sparse / dense for dense, sparse in seconds),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    threads = parser.parse_args().threads
    torch.set_num_threads(threads)
    print(f"torch {torch.__version__}, {threads} thread(s)")
    shapes = [((rows,), classes, k) for rows, classes, k in CLASSIFIERS]
    shapes += [((batch, length), classes, k) for batch, length, classes, k in TOKENS]
    for members in (1, 3):
        for rows, classes, k in shapes:
            for name, make in steps(classes, k, rows, members):
                size = classes * torch.Size(rows).numel() * members
                rounds = max(9, min(300, 30_000_000 // size))
                for settings in SETTINGS:
                    milliseconds, ratio = compare(*make(**settings), rounds)
                    print(
                        f"{name:6} {list(rows)!s:9} {classes:6} classes, k {k:3}, x {members}  "
                        f"{' '.join(f'{key} {value}' for key, value in settings.items()):48} "
                        f"{milliseconds:8.2f} ms {ratio:5.2f}",
                        flush=True,
                    )


if __name__ == "__main__":
    main()
