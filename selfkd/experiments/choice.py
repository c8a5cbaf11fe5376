"""Which trial of a search is taken: one at the config's own setting, unless another is told apart.

The best of many trials on few items is mostly luck, and its setting is the next generation's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from selfkd.config import SPACE, Config, get
from selfkd.config.space import Distribution, Point
from selfkd.results import TrialResult, find_metric

APART = 1.5
"""Standard errors by which accuracies of two models on the same items are told apart. The errors
count as independent; models that mostly err on the same items differ by less, so that this is about
the 5 % level of McNemar's test."""


def choose(
    config: Config,
    space: Mapping[str, Distribution],
    ranked: Sequence[TrialResult],
    *,
    items: int,
) -> list[TrialResult]:
    """Return trials with the one that is taken first.

    Accuracies p and q on n items are not told apart where

        |p - q| <= 1.5 sqrt((p (1 - p) + q (1 - q)) / n)

    Of the trials that are not told apart from the best, the one nearest to the config's own values
    is taken, by the sum of squared differences of their quantiles in the space. In a space of the
    user's own, and by another metric, whose spread is not known, it is the best.

    Args:
        config: Config of the search.
        space: Search space by dotted key.
        ranked: Completed trials, best first.
        items: Number of validation items; 0 where it is not known.
    """
    metric = config.search.metric
    if config.search.space != SPACE or not (find_metric(metric).is_fraction and items and ranked):
        return list(ranked)
    best = ranked[0].metrics[metric]

    def near(trial: TrialResult) -> bool:
        value = trial.metrics[metric]
        error = math.sqrt((best * (1 - best) + value * (1 - value)) / items)
        return best - value <= APART * error

    taken = min(filter(near, ranked), key=lambda trial: distance(config, space, trial.point))
    return [taken, *(trial for trial in ranked if trial is not taken)]


def distance(config: Config, space: Mapping[str, Distribution], point: Point) -> float:
    """Return the squared distance of a point from a config's own values.

    Each key counts with the difference of its quantiles; words, and keys outside the space, with 1
    where they differ.

    >>> space = {"distill.alpha": Distribution("uniform", (0, 1))}
    >>> distance(Config(), space, {"distill.alpha": Config().distill.alpha})
    0.0
    """
    total = 0.0
    for key, value in point.items():
        own = get(config, key)
        if key in space and space[key].kind != "choice" and isinstance(own, int | float):
            total += (space[key].quantile(value) - space[key].quantile(own)) ** 2
        elif own is not None:
            total += value != own
    return total
