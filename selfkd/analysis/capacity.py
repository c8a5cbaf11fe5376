"""Accuracy against size, with labels only and distilled: where distillation helps, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from selfkd.analysis.statistics import holm, mean_interval, paired_interval, paired_p
from selfkd.analysis.verdicts import Mode, format_difference, is_better, metric_format, short
from selfkd.results import Evaluation, Interval, Seeds, Size

SIGNIFICANT = 0.05
"""Level of the tests."""


def compare_size(
    labels: Sequence[Evaluation],
    distilled: Sequence[Evaluation],
    teacher: float,
    *,
    metric: str,
    mode: Mode = "max",
) -> Size:
    """Return a size with its students from labels only and distilled, compared seed by seed.

    Args:
        labels: Evaluated students, one a seed.
        distilled: Evaluated students on the same seeds in the same order.
        teacher: Metric of the teacher.
        metric: Name of the metric on test.
        mode: Whether more of it is better, or less.
    """
    sign = 1 if mode == "max" else -1
    alone, with_teacher = ([row.metrics[metric] for row in rows] for rows in (labels, distilled))
    return Size(
        value=0,
        parameters=0,
        labels=_seeds(labels, alone),
        distilled=_seeds(distilled, with_teacher),
        difference=paired_interval(with_teacher, alone),
        room=mean_interval([sign * (teacher - value) for value in alone]),
        p=paired_p(with_teacher, alone),
    )


def _seeds(rows: Sequence[Evaluation], runs: Sequence[float]) -> Seeds:
    means = {
        name: sum(row.metrics[name] for row in rows) / len(rows)
        for name in rows[0].metrics
        if name.startswith(("val_", "test_"))
    }
    return Seeds(**vars(mean_interval(runs)), runs=tuple(runs), metrics=means)


def judged(sizes: Sequence[Size], *, mode: Mode = "max") -> list[Size]:
    """Return sizes with `p_holm` and `verdict`: helps, hurts, no evidence, or unknown.

    Tests are at 5 %, by Holm for all sizes together; the verdict on a single pair is unknown.
    """
    corrected = iter(holm([size.p for size in sizes if size.p is not None]))
    found = []
    for size in sizes:
        if size.p is None:
            single = len(size.labels.runs) == 1
            found.append(replace(size, verdict="unknown" if single else "no evidence"))
            continue
        p_holm, verdict = next(corrected), "no evidence"
        if p_holm <= SIGNIFICANT:
            verdict = "helps" if (size.difference.value > 0) == (mode == "max") else "hurts"
        found.append(replace(size, p_holm=p_holm, verdict=verdict))
    return found


def mean_gain(sizes: Sequence[Size]) -> Interval | None:
    """Return the difference averaged over all sizes, with its interval over seeds.

    Sizes share their seeds, so each seed gives one mean; a single test, without correction. None
    where a size lacks a seed.
    """
    gains = [np.subtract(size.distilled.runs, size.labels.runs).tolist() for size in sizes]
    if len({len(of_size) for of_size in gains}) != 1:
        return None
    return mean_interval(np.mean(gains, axis=0).tolist())


def describe_curve(
    sizes: Sequence[Size],
    gain: Interval | None,
    *,
    metric: str = "test_accuracy",
    mode: Mode = "max",
) -> list[str]:
    """Return where distillation helps, its mean gain, and why it may not help elsewhere.

    Args:
        sizes: Sizes with their verdicts.
        gain: Mean gain over the sizes.
        metric: Name of the metric on test.
        mode: Whether more of it is better, or less.

    Returns:
        The verdict first, then further lines.
    """
    if all(size.verdict == "unknown" for size in sizes):
        return ["one seed: no interval, so no verdict on where distillation helps"]
    lines = [_verdict(sizes)]
    if gain is not None and gain.low is not None and gain.high is not None and len(sizes) > 1:
        worse = is_better(gain.reversed(), mode=mode)
        sure = "it helps" if is_better(gain, mode=mode) else "it hurts" if worse else "no evidence"
        value = format_difference(gain, form=metric_format(metric))
        lines.append(f"on average over the {len(sizes)} sizes: {value}, {sure}")
    unsure = [size for size in sizes if size.verdict == "no evidence"]
    alone = [size for size in unsure if size.p is not None and size.p <= SIGNIFICANT]
    large = [size for size in unsure if not _has_room(size)]
    small = [size for size in unsure if _has_room(size)]
    if alone:
        lines.append(
            f"{_listed(alone)}: the interval leaves out 0, but among {len(sizes)} sizes looked at "
            "that may be chance; more seeds would show (confirm.seeds)"
        )
    if large:
        lines.append(
            f"{_listed(large)}: labels alone are not evidently below the teacher: perhaps large "
            "enough without it"
        )
    if small:
        lines.append(
            f"{_listed(small)}: below the teacher with labels alone and not evidently helped: too "
            "small to follow it, or too few seeds"
        )
    return lines


def _verdict(sizes: Sequence[Size]) -> str:
    helps, hurts = _ranges(sizes, "helps"), _ranges(sizes, "hurts")
    parts = [f"distillation helps {helps}"] if helps else []
    parts += [f"distillation hurts {hurts}"] if hurts else []
    if not parts:
        return f"no evidence that distillation helps at any one size {_ranges(sizes)}"
    if any(size.verdict not in ("helps", "hurts") for size in sizes):
        parts.append("no evidence outside")
    return "; ".join(parts)


def _has_room(size: Size) -> bool:
    """Say whether labels only are evidently below the teacher."""
    low = size.room.low
    return low is not None and low > 0


def _listed(sizes: Sequence[Size]) -> str:
    return ", ".join(short(size.parameters) for size in sizes) + " parameters"


def _ranges(sizes: Sequence[Size], verdict: str | None = None) -> str:
    """Return the ranges of a verdict, or of all: `from 3 k to 12 k parameters and at 50 k …`."""
    groups: list[list[Size]] = []
    before = False
    for size in sizes:
        holds = verdict in (None, size.verdict)
        if holds and not before:
            groups.append([])
        if holds:
            groups[-1].append(size)
        before = holds
    ends = [(short(group[0].parameters), short(group[-1].parameters)) for group in groups]
    return " and ".join(
        f"at {first} parameters" if first == last else f"from {first} to {last} parameters"
        for first, last in ends
    )
