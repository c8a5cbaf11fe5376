"""Times of predictions, measured side by side."""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from selfkd.results import Interval

_FEWEST = 6  # rounds, below which no two of their ratios enclose the median with 95 %
_now = time.perf_counter if sys.platform == "win32" else time.thread_time
_BURST = 1.0  # ms of the calls that are timed as one
_LONG = 20.0  # ms of a call that caches matter little to


def time_together(
    calls: Mapping[str, Callable[[], object]], *, budget: float = 2.0, rounds: int = 40
) -> dict[str, list[float]]:
    """Return the times of functions in rounds, in each of which every function has its turn.

    It is the processor's time of this thread (on Windows, whose clock of it is coarse, the time
    that passes), so that waiting for other processes does not count: what is timed must run on this
    thread alone. As the functions take turns, in an order that changes, all see the same caches and
    frequency, and ratios hold where times do not. A short function is called once more before it
    is timed, as others have used the caches, and is timed over as many calls as take 1 ms.

    Args:
        calls: Functions by name.
        budget: Seconds after which no further round begins, where there were 6.
        rounds: Largest number of rounds.

    Returns:
        Milliseconds of one call by name, one a round.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        start = time.perf_counter()
        for call in calls.values():
            call()
        once = {name: _time(call, 1) for name, call in calls.items()}
        times: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds):
            if number >= _FEWEST and time.perf_counter() - start > budget:
                break
            names = list(calls)
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                if once[name] < _LONG:
                    calls[name]()
                repeats = max(1, math.ceil(_BURST / max(once[name], 1e-3)))
                times[name].append(_time(calls[name], repeats))
    finally:
        torch.set_num_threads(threads)
    return times


def _time(call: Callable[[], object], repeats: int) -> float:
    before = _now()
    for _ in range(repeats):
        call()
    return (_now() - before) * 1000 / repeats


def speed_up(reference: Sequence[float], other: Sequence[float]) -> Interval:
    """Return how many times as fast as a reference something is: the median over rounds.

    The interval holds the median with at least 95 %, whatever the distribution of the ratios (as in
    the sign test); below 6 rounds there is none.

    Args:
        reference: Times of the reference, one a round.
        other: Times in the same rounds.

    >>> speed_up([2.0, 2.2, 1.8, 2.0, 9.0, 2.0], [1.0, 1.1, 0.9, 1.0, 1.0, 0.8])
    Interval(value=2.0, low=2.0, high=9.0)
    """
    ratios = sorted(a / b for a, b in zip(reference, other, strict=True))
    outside = _outside(len(ratios))
    if outside < 0:
        return Interval(statistics.median(ratios))
    return Interval(statistics.median(ratios), ratios[outside], ratios[-1 - outside])


def _outside(number: int) -> int:
    """Return how many of ordered values lie below a 95 % interval of their median; -1 if none is.

    >>> [_outside(number) for number in (5, 6, 20, 40)]
    [-1, 0, 5, 13]
    """
    below, tail = -1, 0.0
    while True:
        tail += math.comb(number, below + 1) / 2**number
        if tail > 0.025:
            return below
        below += 1
