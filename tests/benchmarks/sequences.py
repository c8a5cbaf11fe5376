"""Time and memory of the loss of token logits against the plain PyTorch expression.

    OMP_NUM_THREADS=1 python -m tests.benchmarks.sequences

Forward and backward of 512 tokens over a vocabulary of 32,000, float32, T = 2, turn by turn in one
process. Time of the processor: the median and the least over the rounds. Extra memory: the peak of
bytes allocated during a step, as the profiler records every allocation and release, less the
gradients returned.
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

from selfkd.losses.sequences import (
    LinearLogits,
    linear_sequence_terms,
    sampled_targets,
    sequence_terms,
)
from selfkd.losses.sparse import REST_TEMPERATURES, SparseLogits, sparsify

TOKENS, VOCABULARY, WIDTH = (4, 128), 32_000, 256
TEMPERATURE, ALPHA, K = 2.0, 0.9, 64
Step = Callable[[], tuple[Tensor, ...]]


def plain(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
    """The expression that tutorials give."""
    student, teacher, labels = student.flatten(0, 1), teacher.flatten(0, 1), labels.flatten()
    soft = F.kl_div(
        F.log_softmax(student / TEMPERATURE, -1),
        F.log_softmax(teacher / TEMPERATURE, -1),
        log_target=True,
        reduction="batchmean",
    )
    return (1 - ALPHA) * F.cross_entropy(student, labels) + ALPHA * TEMPERATURE**2 * soft


def plain_sparse(student: Tensor, teacher: SparseLogits, labels: Tensor) -> Tensor:
    """The k classes alone, each side normalised over all of them and a bucket."""
    log_p = F.log_softmax(student / TEMPERATURE, -1)
    masked = log_p.scatter(-1, teacher.indices, -torch.inf)
    log_q = torch.cat([log_p.gather(-1, teacher.indices), masked.logsumexp(-1, True)], -1)
    assert teacher.rest_grid is not None
    at_t = REST_TEMPERATURES.index(TEMPERATURE)
    bucket = teacher.rest_grid[..., at_t : at_t + 1]
    log_t = F.log_softmax(torch.cat([teacher.values / TEMPERATURE, bucket], -1), -1)
    soft = (log_t.exp() * (log_t - log_q)).sum(-1).mean()
    hard = F.cross_entropy(student.flatten(0, 1), labels.flatten())
    return (1 - ALPHA) * hard + ALPHA * TEMPERATURE**2 * soft


def peak_extra_bytes(step: Step) -> int:
    """Return the most bytes allocated at once in `step`, less its results."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        results = step()
    held = peak = 0
    events = profiler.profiler.kineto_results.events()
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak - sum(result.nbytes for result in results)


def compare(name: str, steps: list[Step], rounds: int) -> str:
    """Return one line: milliseconds and MiB of the plain expression and ours, and their ratios."""
    for plain_gradient, our_gradient in zip(steps[0](), steps[1](), strict=True):
        torch.testing.assert_close(our_gradient, plain_gradient, rtol=1e-3, atol=1e-6)
    seconds: list[list[float]] = [[], []]
    for _ in range(rounds):
        for step, taken in zip(steps, seconds, strict=True):
            start = time.process_time()
            step()
            taken.append(time.process_time() - start)
    (plain_median, our_median), (plain_least, our_least) = (
        [1e3 * reduce(taken) for taken in seconds] for reduce in (statistics.median, min)
    )
    plain_bytes, our_bytes = (peak_extra_bytes(step) / 2**20 for step in steps)
    return (
        f"{name:7} {plain_median:9.1f} {our_median:8.1f} {our_median / plain_median:6.2f} "
        f"{our_least / plain_least:6.2f} {plain_bytes:10.1f} {our_bytes:8.1f} "
        f"{our_bytes / plain_bytes:6.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--chunk", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, *TOKENS, VOCABULARY, generator=generator)
    student.requires_grad_()
    labels = torch.randint(VOCABULARY, TOKENS, generator=generator)
    hidden = torch.randn(*TOKENS, WIDTH, generator=generator, requires_grad=True)
    weight = (torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5).requires_grad_()
    states = torch.randn(*TOKENS, WIDTH, generator=generator)
    their_head = torch.randn(VOCABULARY, WIDTH, generator=generator) / WIDTH**0.5
    settings = {"temperature": TEMPERATURE, "alpha": ALPHA, "chunk": arguments.chunk}
    sparse = sparsify(teacher, K)
    drawn = sampled_targets(teacher, K, temperature=TEMPERATURE, generator=generator)

    def gradients(loss: Callable[[], Tensor], *inputs: Tensor) -> tuple[Tensor, ...]:
        return torch.autograd.grad(loss(), inputs)

    def ours(target: Tensor | SparseLogits) -> Tensor:
        return sequence_terms(student, target, labels, **settings).loss

    def head(target: Tensor | SparseLogits | LinearLogits) -> Tensor:
        return linear_sequence_terms(hidden, weight, target, labels, **settings).loss

    def plain_drawn() -> Tensor:
        log_p = F.log_softmax(student / TEMPERATURE, -1).gather(-1, drawn.indices)
        soft = (drawn.weights * (drawn.log_p - log_p)).sum(-1).mean()
        hard = F.cross_entropy(student.flatten(0, 1), labels.flatten())
        return (1 - ALPHA) * hard + ALPHA * TEMPERATURE**2 * soft

    cases: dict[str, list[Step]] = {
        "dense": [
            partial(gradients, lambda: plain(student, teacher, labels), student),
            partial(gradients, lambda: ours(teacher), student),
        ],
        "sparse": [
            partial(gradients, lambda: plain_sparse(student, sparse, labels), student),
            partial(gradients, lambda: ours(sparse), student),
        ],
        "drawn": [
            partial(gradients, plain_drawn, student),
            partial(gradients, lambda: ours(drawn), student),
        ],
        "head": [
            partial(gradients, lambda: plain(hidden @ weight.T, teacher, labels), hidden, weight),
            partial(gradients, lambda: head(teacher), hidden, weight),
        ],
        "heads": [
            partial(
                gradients,
                lambda: plain(hidden @ weight.T, states @ their_head.T, labels),
                hidden,
                weight,
            ),
            partial(gradients, lambda: head(LinearLogits(states, their_head)), hidden, weight),
        ],
    }
    print(f"torch {torch.__version__}, {arguments.threads} thread(s), chunk {arguments.chunk}")
    print("teacher  plain ms  ours ms median  least  plain MiB ours MiB  ratio")
    for name, steps in cases.items():
        print(compare(name, steps, arguments.rounds), flush=True)


if __name__ == "__main__":
    main()
