"""The verdict of a family of comparisons, at an error rate of 5 % for all of it.

Many comparisons find something by chance: of six equal generations, nine intervals at 95 % claim a
gain or a loss in a quarter of all runs. So one question comes first, and what follows is corrected.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from selfkd.analysis.statistics import CONFIDENCE, LEAST, SAME, holm, paired_interval, paired_p
from selfkd.analysis.verdicts import count, format_difference, join, points, ranges
from selfkd.results import Comparison, Interval, Mode, Outcome, Verdict

LEVEL = 1 - CONFIDENCE
"""Error rate of a family."""
LARGEST_CLOSED = 12
"""Most members of a closed test, which has 2^R - 1 sets."""
Method = Literal["closed", "holm"]
Floats = NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Pairs:
    """What is compared with what: seed by seed, or a pair of models over the items of a split."""

    name: str
    """Name of what may be better."""
    to: str
    """Name of what it is compared with."""
    values: Mapping[int, tuple[float, float]] = field(default_factory=dict)
    """Metric of both, by seed."""
    over_items: Interval | None = None
    """Difference over items, which is no matter of seeds."""
    items: str = ""
    """Number and name of these items."""

    @classmethod
    def of(
        cls, name: str, to: str, values: Mapping[int, float], others: Mapping[int, float]
    ) -> Pairs:
        """Return the pairs of the seeds that both have, as far as they are finite."""
        both = {seed: (value, others[seed]) for seed, value in values.items() if seed in others}
        finite = {seed: pair for seed, pair in both.items() if all(map(math.isfinite, pair))}
        return cls(name=name, to=to, values=finite)


@dataclass(frozen=True, kw_only=True)
class Terms:
    """How differences are judged and written."""

    mode: Mode = "max"
    """Whether more of the metric is better, or less."""
    form: Callable[[float], str] = points
    """Format of a difference."""
    unit: str = ""
    """Name of the metric, where the format does not say it."""
    floor: float = 0.0
    """Least spread over seeds: of an accuracy one item, 1 / items."""
    covers: Literal["seeds", "lineages"] = "seeds"
    """What intervals cover."""
    replica: str = "fresh seed"
    """Name of what is repeated."""


def closed_test(differences: Floats, *, floor: float = 0.0, noise: float = 0.0) -> Floats:
    """Return p-values of members by a closed test on the means of all sets of them.

        p_k = max over the sets S that hold k of the p of the paired t test of mean_{i in S} d_i,
        1 where the mean of S has another sign than that of k

    Whichever members are truly no better, the set of just these is one of those tested: any of them
    is called better or worse with a probability of at most the level.

    Args:
        differences: Differences `[…, seeds, members]`.
        floor: Least spread of a mean over seeds.
        noise: Largest spread that is of floating-point rounding, which is no spread to test by.

    Returns:
        p-values `[…, members]`.

    Reference:
        Marcus, Peritz, Gabriel, "On closed testing procedures with special reference to ordered
        analysis of variance", Biometrika, 1976, https://doi.org/10.1093/biomet/63.3.655

    >>> rows = np.array([[0.1, 0.9, 1.0], [-0.1, 1.1, 1.2], [0.0, 1.0, 0.9], [0.1, 0.8, 1.0]])
    >>> closed_test(rows).round(4).tolist()
    [0.6376, 0.0007, 0.0005]
    """
    from scipy.stats import t  # slow to import

    seeds, members = differences.shape[-2:]
    sets = np.arange(1, 2**members)[:, None] >> np.arange(members) & 1
    weights = sets / sets.sum(axis=1, keepdims=True)
    mean = differences.mean(axis=-2)
    centred = differences - mean[..., None, :]
    covariance = np.swapaxes(centred, -1, -2) @ centred / (seeds - 1)
    means = mean @ weights.T
    variances = ((weights @ covariance) * weights).sum(axis=-1)
    spreads = np.maximum(np.sqrt(np.maximum(variances, 0)), floor)
    has_spread = spreads > noise
    ratio = np.abs(means) / np.where(has_spread, spreads, 1)
    p = np.where(has_spread, 2 * t.sf(ratio * math.sqrt(seeds), seeds - 1), 1.0)
    same = np.sign(means)[..., :, None] == np.sign(mean)[..., None, :]
    found: Floats = np.where(sets, np.where(same, p[..., None], 1.0), 0.0).max(axis=-2)
    return found


def judge(
    family: Sequence[Pairs],
    *,
    terms: Terms,
    together: str = "",
    noun: str = "",
    method: Method = "holm",
) -> Verdict:
    """Return the verdict of a family of comparisons, at an error rate of 5 % for all of it.

    With `together` the headline is the mean of all members, over the seeds that all have. Under the
    closed test it comes first, at the full level, and a member counts only where it does; above 12
    members Holm over them takes the place of the closed test. By `holm` the mean is one comparison
    more. Without `together` the first comparison is the headline.

    Args:
        family: Comparisons, at least one.
        terms: How they are judged and written.
        together: Name of all members taken together, a plural.
        noun: Name of a member, which is followed by its number in the members' names.
        method: Correction over the members.
    """
    if len(family) == 1 or not together:
        comparisons = _corrected([_alone(pairs, terms) for pairs in family], terms)
        sentences = [
            _sentence(each, pairs, terms, among=len(family))
            for each, pairs in zip(comparisons, family, strict=True)
        ]
        if len(family) > 1:
            sentences.append(f"corrected for all {len(family)} comparisons (Holm)")
        head, seeds = comparisons[0], len(family[0].values)
    else:
        whole, rows = _mean(family, together)
        head, seeds = _alone(whole, terms), len(rows)
        comparisons = [_alone(pairs, terms) for pairs in family]
        if method == "holm":
            head, *comparisons = _corrected([head, *comparisons], terms)
        elif len(family) <= LARGEST_CLOSED:
            comparisons = _closed(comparisons, rows, head, family, terms)
        else:
            method, comparisons = "holm", _after(head, _corrected(comparisons, terms))
        head = _decided(head, terms)
        sentences = [_sentence(head, whole, terms, plural=True)]
        if noun and head.outcome != "none":
            sentences.append(_which(head, comparisons, noun, method))
    return Verdict(
        name=head.name,
        to=head.to,
        difference=head.difference,
        p=head.p,
        outcome=head.outcome,
        seeds=seeds,
        covers=terms.covers,
        method=method,
        comparisons=tuple(comparisons),
        sentences=tuple(sentences),
    )


def _alone(pairs: Pairs, terms: Terms) -> Comparison:
    """Return a comparison with its own p-value, not corrected yet."""
    difference, p = pairs.over_items, None
    if difference is not None:
        p = _normal_p(difference)
    elif pairs.values:
        values, others = zip(*pairs.values.values(), strict=True)
        difference = paired_interval(values, others, floor=terms.floor)
        p = paired_p(values, others, floor=terms.floor)
    return Comparison(name=pairs.name, to=pairs.to, difference=difference, p=p)


def _normal_p(interval: Interval) -> float | None:
    """Return the p-value that goes with an interval over many items."""
    if interval.low is None or interval.high is None:
        return None
    from scipy.stats import norm  # slow to import

    error = (interval.high - interval.low) / (2 * norm.ppf((1 + CONFIDENCE) / 2))
    return float(2 * norm.sf(abs(interval.value) / error))


def _mean(family: Sequence[Pairs], together: str) -> tuple[Pairs, Floats]:
    """Return all members taken together, and their differences `[seeds, members]`."""
    seeds = [seed for seed in family[0].values if all(seed in pairs.values for pairs in family)]
    table = np.array([[pairs.values[seed] for pairs in family] for seed in seeds], np.float64)
    table = table.reshape(len(seeds), len(family), 2)
    mean = (table / len(family)).sum(axis=1)
    means = {seed: (float(a), float(b)) for seed, (a, b) in zip(seeds, mean, strict=True)}
    return Pairs(name=together, to=family[0].to, values=means), table[..., 0] - table[..., 1]


def _corrected(comparisons: Sequence[Comparison], terms: Terms) -> list[Comparison]:
    """Return comparisons with p-values corrected by Holm, decided."""
    corrected = iter(holm([each.p for each in comparisons if each.p is not None]))
    return [
        each if each.p is None else _decided(replace(each, p=next(corrected)), terms)
        for each in comparisons
    ]


def _closed(
    comparisons: Sequence[Comparison],
    rows: Floats,
    head: Comparison,
    family: Sequence[Pairs],
    terms: Terms,
) -> list[Comparison]:
    if head.p is None:
        return [replace(each, p=None) for each in comparisons]
    values = [abs(v) for pairs in family for pair in pairs.values.values() for v in pair]
    size = max(values) or 1.0
    corrected = closed_test(rows / size, floor=terms.floor / size, noise=SAME)
    return [
        _decided(replace(each, p=float(p)), terms)
        for each, p in zip(comparisons, corrected, strict=True)
    ]


def _after(head: Comparison, comparisons: Sequence[Comparison]) -> list[Comparison]:
    """Return comparisons that count only where the headline does."""
    if head.p is not None and head.p <= LEVEL:
        return list(comparisons)
    return [replace(each, outcome="none") for each in comparisons]


def _decided(comparison: Comparison, terms: Terms) -> Comparison:
    outcome: Outcome = "none"
    if comparison.difference is not None and comparison.p is not None and comparison.p <= LEVEL:
        gains = (comparison.difference.value > 0) == (terms.mode == "max")
        outcome = "better" if gains else "worse"
    return replace(comparison, outcome=outcome)


# --- words ---


def _sentence(
    found: Comparison, pairs: Pairs, terms: Terms, *, plural: bool = False, among: int = 1
) -> str:
    """Return a comparison in words."""
    name, to, verb = found.name, found.to, "are" if plural else "is"
    seeds = count(len(pairs.values), terms.replica)
    if found.difference is None:
        return f"{name} and {to} share no {terms.replica}: nothing to compare"
    value = format_difference(found.difference, form=terms.form)
    value += f" in {terms.unit}" if terms.unit else ""
    over = f"over {pairs.items or seeds}"
    if found.outcome != "none":
        return f"{name} {verb} {found.outcome} than {to}: {value} {over}"
    if found.p is None and pairs.over_items is None and len(pairs.values) < LEAST:
        return f"{name} and {to} differ by {value} {over}, too few for an interval"
    if found.p is None:
        of = pairs.items or seeds
        return f"{name} and {to} differ by {value}, the same on all {of}, so there is no interval"
    low, high = found.difference.low, found.difference.high
    chance = among > 1 and low is not None and high is not None and not low <= 0 <= high
    rest = f", which among {among} comparisons may be chance" if chance else ""
    return f"no evidence that {name} {verb} better than {to} (difference {value} {over}{rest})"


def _which(head: Comparison, comparisons: Sequence[Comparison], noun: str, method: Method) -> str:
    """Return which members count, in words."""
    sets = 2 ** len(comparisons) - 1
    corrected = (
        f"corrected for all {sets:,} sets of {noun}s (closed test)"
        if method == "closed"
        else f"corrected for all {len(comparisons)} comparisons (Holm)"
    )
    parts = []
    for outcome in ("better", "worse"):
        called = [each.name for each in comparisons if each.outcome == outcome]
        numbers = ranges([int(name.removeprefix(f"{noun} ")) for name in called])
        if len(called) == len(comparisons):
            parts.append(f"each of {noun}s {numbers} is by itself {outcome} than {head.to}")
        elif len(called) > 1:
            parts.append(f"{noun}s {numbers} are each by themselves {outcome} than {head.to}")
        elif called:
            parts.append(f"{called[0]} is by itself {outcome} than {head.to}")
    if not parts:
        parts.append(f"no single {noun} is by itself {head.outcome} than {head.to}")
    return f"{join(parts)}, {corrected}"
