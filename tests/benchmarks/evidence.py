"""Error rates and power of the verdict on born-again generations, simulated.

    python tests/benchmarks/evidence.py [--runs 4000]

Each run draws the accuracy of generations 0 to 5 on some seeds, rounded to 1,197 test images, and
is judged as `selfkd.generations` judges. A false verdict is any generation, or all of them taken
together, called better or worse without being so.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from selfkd.analysis.families import closed_test
from selfkd.analysis.statistics import holm

IMAGES = 1197
GENERATIONS = 5
LEVEL = 0.05
Floats = NDArray[np.float64]


def draw(
    runs: int,
    seeds: int,
    gains: Sequence[float],
    *,
    spread: float = 0.003,
    first: float | None = None,
    seed: int = 0,
) -> Floats:
    """Return accuracies `[runs, seeds, generations]`.

    Args:
        runs: Number of runs.
        seeds: Number of seeds of each.
        gains: True gain of each born-again generation over generation 0, a fraction.
        spread: Standard deviation over seeds, a fraction.
        first: That of generation 0, where it is another.
        seed: Seed of the draws.
    """
    spreads = np.full(len(gains) + 1, spread)
    spreads[0] = spread if first is None else first
    noise = np.random.default_rng(seed).normal(size=(runs, seeds, len(gains) + 1)) * spreads
    return np.round((0.9 + np.array([0, *gains]) + noise) * IMAGES) / IMAGES


def closed(accuracy: Floats) -> tuple[Floats, Floats]:
    """Return the p of all generations taken together, and of each."""
    differences = accuracy[..., 1:] - accuracy[..., :1]
    together = closed_test(differences.mean(axis=-1, keepdims=True), floor=1 / IMAGES)
    return together[..., 0], closed_test(differences, floor=1 / IMAGES)


def by_holm(accuracy: Floats) -> Floats:
    """Return p-values corrected by Holm over the comparisons with generation 0."""
    differences = accuracy[..., 1:] - accuracy[..., :1]
    return np.array([holm(row) for row in _t_test(differences).tolist()])


def intervals(accuracy: Floats) -> Floats:
    """Return uncorrected p-values of the comparisons with generation 0 and with the one before."""
    first = accuracy[..., 1:] - accuracy[..., :1]
    previous = accuracy[..., 2:] - accuracy[..., 1:-1]
    return _t_test(np.concatenate([first, previous], axis=-1))


def _t_test(differences: Floats) -> Floats:
    seeds = differences.shape[1]
    spread = np.maximum(differences.std(axis=1, ddof=1), 1 / IMAGES)
    statistic = np.abs(differences.mean(axis=1)) / spread * np.sqrt(seeds)
    found: Floats = 2 * stats.t.sf(statistic, seeds - 1)
    return found


def error(p_values: Sequence[Floats]) -> float:
    """Return the share of runs in which any of the p-values is at most 5 %."""
    found = [np.atleast_2d(p.T).min(axis=0) <= LEVEL for p in p_values]
    return float(np.any(found, axis=0).mean())


def stopped_after(accuracy: Floats, *, taken_together: bool) -> Floats:
    """Return after which generation `rounds: auto` stops in each run, at most the last.

    Args:
        accuracy: Accuracies on validation.
        taken_together: Whether the last two generations are compared with the one before them,
            one-sided at 5 %, or each with the one before it by its interval at 95 %.
    """
    runs, seeds, count = accuracy.shape

    def gains(differences: Floats, level: float) -> Floats:
        spread = np.maximum(differences.std(axis=1, ddof=1), 1 / IMAGES)
        statistic = differences.mean(axis=1) / spread * np.sqrt(seeds)
        return np.asarray(stats.t.sf(statistic, seeds - 1) <= level)

    stopped = np.full(runs, count - 1)
    for last in range(count - 1, 1, -1):
        before = accuracy[..., last - 2]
        if taken_together:
            goes = gains(accuracy[..., last - 1 : last + 1].mean(axis=-1) - before, LEVEL)
        else:
            steps = np.diff(accuracy[..., last - 2 : last + 1], axis=-1)
            goes = (gains(steps[..., 0], LEVEL / 2)) | (gains(steps[..., 1], LEVEL / 2))
        stopped[~goes] = last
    return stopped


def main(argv: Sequence[str] | None = None) -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=4000)
    runs = parser.parse_args(argv).runs
    counts = (3, 5, 6, 10)
    none, all_gain, last = [0.0] * 5, [0.005] * 5, [0.0] * 4 + [0.01]
    write = sys.stdout.write
    write("| | 3 seeds | 5 | 6 | 10 |\n|---|---|---|---|---|\n")

    def row(name: str, values: Sequence[float]) -> None:
        write(f"| {name} | " + " | ".join(f"{100 * value:.1f} %" for value in values) + " |\n")

    equal = [draw(runs, n, none, seed=n) for n in counts]
    unequal = [draw(runs, n, none, spread=0.002, first=0.007, seed=n) for n in counts]
    row("false verdict: nine intervals", [error([intervals(a)]) for a in equal])
    row("false verdict: Holm", [error([by_holm(a)]) for a in equal])
    row("false verdict: mean first, closed test", [error(closed(a)) for a in equal])
    row("the same, generation 0 spread more", [error(closed(a)) for a in unequal])
    gained = [draw(runs, n, all_gain, seed=n) for n in counts]
    row("all +0.5 points: headline", [float((closed(a)[0] <= LEVEL).mean()) for a in gained])
    row("any generation by Holm", [error([by_holm(a)]) for a in gained])
    row("a given generation", [float((closed(a)[1] <= LEVEL).mean()) for a in gained])
    row("a given generation by Holm", [float((by_holm(a) <= LEVEL).mean()) for a in gained])
    late = [draw(runs, n, last, seed=n) for n in counts]
    row("the last alone +1 point", [float((closed(a)[1][:, -1] <= LEVEL).mean()) for a in late])
    row("the last alone by Holm", [float((by_holm(a)[:, -1] <= LEVEL).mean()) for a in late])
    write(
        "\n| stops after generation (median; share that goes beyond 2) | 3 seeds | 5 | 6 | 10 |\n"
    )
    write("|---|---|---|---|---|\n")
    climbs = [0.004 * k for k in range(1, 11)]
    for name, gains in (("no gain", [0.0] * 10), ("+0.4 points each", climbs)):
        for together in (False, True):
            found = [
                stopped_after(draw(runs, n, gains, seed=n), taken_together=together) for n in counts
            ]
            cells = [f"{np.median(a):.0f}; {100 * (a > 2).mean():.1f} %" for a in found]
            rule = "two taken together" if together else "one by one"
            write(f"| {name}, {rule} | " + " | ".join(cells) + " |\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
