"""Times of predictions, measured side by side."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence

import torch
from threadpoolctl import threadpool_limits

from selfkd.results import Interval


def time_together(
    calls: Mapping[str, Callable[[], object]],
    *,
    budget: float = 2.0,
    rounds: int = 30,
) -> dict[str, list[float]]:
    """Return the milliseconds of calls in rounds, each of which has one of every call.

    Args:
        calls: Functions by name.
        budget: Seconds after which no further round begins, where there were 5.
        rounds: Largest number of rounds.

    Returns:
        Times by name, one a round.
    """
    threads = torch.get_num_threads()
    times: dict[str, list[float]] = {name: [] for name in calls}
    torch.set_num_threads(1)
    try:
        with threadpool_limits(1):
            start = time.perf_counter()
            for call in [*calls.values()] * 2:
                call()
            for done in range(rounds):
                if done >= 5 and time.perf_counter() - start > budget:
                    break
                for name, call in calls.items():
                    before = time.perf_counter()
                    call()
                    times[name].append((time.perf_counter() - before) * 1000)
    finally:
        torch.set_num_threads(threads)
    return times


def speed_up(reference: Sequence[float], other: Sequence[float]) -> Interval:
    """Return how many times as fast as a reference something is.

    Args:
        reference: Times of the reference, one a round.
        other: Times in the same rounds.

    >>> speed_up([2.0, 2.2, 1.8], [1.0, 1.1, 0.9]).value
    2.0
    """
    ratios = sorted(a / b for a, b in zip(reference, other, strict=True))
    middle = statistics.median(ratios)
    if len(ratios) < 6:
        return Interval(middle)
    reach = math.ceil(0.98 * math.sqrt(len(ratios)))  # of the sign test, 95 %
    low = max(0, len(ratios) // 2 - reach)
    high = min(len(ratios) - 1, (len(ratios) - 1) // 2 + reach)
    return Interval(middle, ratios[low], ratios[high])
