"""Statistics across runs: paired where seeds and data are the same, else unpaired, with why."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from selfkd.analysis import verdicts
from selfkd.analysis.statistics import CONFIDENCE, LEAST, mean_interval, paired_interval
from selfkd.reporting.read import Run, Tree
from selfkd.results import Interval, find_metric

INCIDENTAL = ("seed", "name", "storage", "tracking", "resources", "rounds", "confirm", "targets")
"""Keys of a config in which repeats may differ: seed and length of a run, where it ran, names."""


@dataclass(frozen=True)
class Arm:
    """The last generation of a run, or its student.

    Args:
        name: Name of the generation, or student.
        val: Validation metric by which it was chosen, optimistic.
        test: Test metric of the chosen model, such as its accuracy.
        values: Test metric of each fresh seed; none where nothing was replicated.
        seeds: Fresh seeds, where they are known.
    """

    name: str
    val: float | None
    test: float | None
    values: tuple[float, ...] = ()
    seeds: tuple[int, ...] = ()

    @property
    def mean(self) -> Interval | None:
        """Mean over the fresh seeds."""
        return mean_interval(self.values) if self.values else None


@dataclass(frozen=True)
class Comparison:
    """How a run differs from another on the test split.

    Args:
        run: Name of the run.
        reference: Name of the other.
        difference: Difference in the metric, run less reference.
        paired: Whether the two are compared seed by seed.
        why: What the interval rests on, or why it is unpaired or absent.
        metric: Name of the metric.
    """

    run: str
    reference: str
    difference: Interval
    paired: bool
    why: str
    metric: str = "test_accuracy"

    @property
    def verdict(self) -> str:
        """Words for it, the same for a gain and for none."""
        metric = find_metric(self.metric)
        form, mode = metric.difference, metric.mode
        if self.difference.low is None:
            difference = verdicts.format_difference(self.difference, form=form)
            return (
                f"no evidence that {self.run} is better than {self.reference} "
                f"(difference {difference}, {self.why})"
            )
        return verdicts.describe_difference(
            *(self.run, self.reference, self.difference, self.why), mode=mode, form=form
        )


@dataclass(frozen=True)
class Across:
    """A generation over several runs of the same config with other seeds.

    Args:
        name: Name of the generation, or ensemble.
        values: Test metric of each run.
        mean: Mean of these values.
        first: Difference to generation 0 of the same run; None of generation 0.
    """

    name: str
    values: tuple[float, ...]
    mean: Interval
    first: Interval | None = None


def last_arm(run: Run) -> Arm | None:
    """Return the last generation of a run, or its student; None where nothing is finished."""
    if (summary := run.ensemble_summary) is not None:
        student, val = summary.rows[-1], summary.chosen.metric(run.metric)
        values = student.runs if summary.seeds else ()
        return Arm("student", val, student.metric(run.data.tested), values=values)
    done = [generation for generation in run.generations if generation.result is not None]
    if not done or done[-1].result is None:
        return None
    last, result = done[-1], done[-1].result
    confirmed, name = last.confirmation, f"generation {last.number}"
    known = confirmed is not None and confirmed.metric == run.data.tested and not confirmed.given
    return Arm(
        name,
        result.metric(run.metric),
        result.metric(run.data.tested),
        values=confirmed.values if confirmed and known else (),
        seeds=confirmed.seeds if confirmed and known else (),
    )


def compare(run: Run, reference: Run) -> Comparison | None:
    """Return how the last model of a run differs from that of another.

    Paired by seed: Student's t of the differences. Else Welch's interval of the means' difference:

        mean_a - mean_b ± t(df) sqrt(s_a²/n_a + s_b²/n_b)

    Args:
        run: Run whose gain is of interest.
        reference: Run that it is compared with.

    Returns:
        The comparison; its interval has no ends where a run has fewer than two fresh seeds. None
        where a run was not measured on the test split, or by another metric.

    Reference:
        Welch, "The generalization of 'Student's' problem when several different population
        variances are involved", Biometrika, 1947, https://doi.org/10.1093/biomet/34.1-2.28
    """
    own, other = last_arm(run), last_arm(reference)
    if own is None or other is None or own.test is None or other.test is None:
        return None
    if run.data.tested != reference.data.tested:
        return None
    make = partial(Comparison, run.name, reference.name, metric=run.data.tested)
    unpaired = why_unpaired(run, reference)
    whose = "" if own.name == other.name else f", {own.name} against {other.name}"
    a, b = own.values, other.values
    pairs = _pairs(own, other) if unpaired is None else ([], [])
    if len(pairs[0]) > 1:
        found, why = paired_interval(*pairs), f"{len(pairs[0])} paired seeds{whose}"
        if found.low is None:
            few_pairs = len(pairs[0]) < LEAST
            why += ", too few for an interval" if few_pairs else ", the same in all: no interval"
        return make(found, True, why)
    if len(a) > 1 and len(b) > 1:
        why = f"unpaired (Welch, {len(a)} and {len(b)} seeds), {unpaired}{whose}"
        return make(welch_interval(a, b), False, why)
    few = f"no interval: {len(a)} and {len(b)} fresh seeds, confirm.seeds must be at least 2{whose}"
    value = (a[0] if a else own.test) - (b[0] if b else other.test)
    why = few if unpaired is None else f"{few}; {unpaired}"
    return make(Interval(value), False, why)


def _pairs(own: Arm, other: Arm) -> tuple[list[float], list[float]]:
    """Return values by shared seed; by their order where the seeds are not known."""
    if not own.seeds or not other.seeds:
        return list(own.values), list(other.values)
    by_seed = [dict(zip(arm.seeds, arm.values, strict=True)) for arm in (own, other)]
    shared = [seed for seed in own.seeds if seed in by_seed[1]]
    return [by_seed[0][seed] for seed in shared], [by_seed[1][seed] for seed in shared]


def welch_interval(a: Sequence[float], b: Sequence[float]) -> Interval:
    """Return the difference of two means with Welch's interval.

    >>> interval = welch_interval([0.9, 0.92, 0.94], [0.8, 0.81, 0.85])
    >>> round(interval.value, 4), round(interval.low, 4), round(interval.high, 4)
    (0.1, 0.0452, 0.1548)
    """
    from scipy.stats import ttest_ind  # a second to import: only when it is used

    value = sum(a) / len(a) - sum(b) / len(b)
    if len({*a}) == len({*b}) == 1:  # no spread at all, which the formula divides by
        return Interval(value)
    ends = ttest_ind(a, b, equal_var=False).confidence_interval(CONFIDENCE)
    return Interval(value, float(ends.low), float(ends.high))


def why_unpaired(run: Run, reference: Run) -> str | None:
    """Return why the seeds of two runs are not the same experiment twice; None where they are."""
    digests = [
        {k: v for k, v in each.facts.fingerprints.items() if k != "transfer"} if each.facts else {}
        for each in (run, reference)
    ]
    if not all(digests):  # a user's training function has data of its own
        return "what data they had is not known of both"
    if digests[0] != digests[1]:
        names = [str(each.get("data.name", "data")) for each in (run, reference)]
        shown = [
            f"{name} {own.get('train')}/{own.get('test')}"
            for name, own in zip(names, digests, strict=True)
        ]
        return f"their data differ (train/test {shown[0]} and {shown[1]})"
    if run.command != reference.command:
        return f"selfkd.{run.command} and selfkd.{reference.command} draw other seeds"
    seeds = run.get("seed"), reference.get("seed")
    if seeds[0] != seeds[1]:
        return f"their seeds differ ({seeds[0]} and {seeds[1]})"
    own, other = last_arm(run), last_arm(reference)
    if own is None or other is None:
        return None
    if own.seeds and other.seeds:
        shared = len(set(own.seeds) & set(other.seeds))
        few = min(len(own.seeds), len(other.seeds)) < 2  # `compare` says so
        return None if shared > 1 or few else f"they share {shared} fresh seeds"
    if len(own.values) != len(other.values):
        return f"they have {len(own.values)} and {len(other.values)} fresh seeds"
    return None


def are_repeats(runs: Sequence[Run]) -> bool:
    """Return whether runs of generations differ in their seed alone."""
    if len(runs) < 2 or any(run.command != "generations" for run in runs):
        return False
    seeds = [run.get("seed") for run in runs]
    same = all(_essence(run.config) == _essence(runs[0].config) for run in runs)
    return same and None not in seeds and len(set(seeds)) == len(runs)


def _essence(config: Tree) -> dict[str, Any]:
    kept = {key: value for key, value in config.items() if key not in INCIDENTAL}
    data = kept.get("data")
    if isinstance(data, Mapping):
        kept["data"] = {k: v for k, v in data.items() if k not in ("root", "download", "workers")}
    return kept


def across(runs: Sequence[Run]) -> list[Across]:
    """Return the test metric by generation over runs, as many generations as all have.

    Differences are to generation 0 of the same run, so they are paired by run.
    """
    shared, tested = min(len(run.results) for run in runs), runs[0].data.tested
    columns: list[tuple[str, list[float | None]]] = [
        (f"generation {k}", [run.results[k].metric(tested) for run in runs]) for k in range(shared)
    ]
    if len({len(run.results) for run in runs}) == 1:
        ensembles = [run.ensemble.metric(tested) if run.ensemble else None for run in runs]
        columns.append(("ensemble of all", ensembles))
    rows: list[Across] = []
    for name, found in columns:
        values = tuple(value for value in found if value is not None)
        if len(values) < len(runs):
            continue
        first = paired_interval(values, rows[0].values) if rows else None
        rows.append(Across(name, values, mean_interval(values), first))
    return rows
