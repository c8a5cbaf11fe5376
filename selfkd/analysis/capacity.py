"""Accuracy against size, with labels only and distilled: where distillation helps, in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from selfkd.analysis.families import LEVEL, Pairs, Terms, judge
from selfkd.analysis.statistics import LEAST, mean_interval, paired_interval, paired_p
from selfkd.analysis.verdicts import short
from selfkd.results import Evaluation, Mode, Seeds, Size, Verdict

FROM_LABELS = "the same from labels only"


def compare_size(
    labels: Sequence[Evaluation],
    distilled: Sequence[Evaluation],
    teacher: float,
    *,
    metric: str,
    terms: Terms,
) -> Size:
    """Return a size with its students from labels only and distilled, compared seed by seed.

    Args:
        labels: Evaluated students, one a seed.
        distilled: Evaluated students on the same seeds in the same order.
        teacher: Metric of the teacher.
        metric: Name of the metric on test.
        terms: How differences are judged.
    """
    sign = 1 if terms.mode == "max" else -1
    alone, with_teacher = ([row.metrics[metric] for row in rows] for rows in (labels, distilled))
    return Size(
        value=0,
        parameters=0,
        labels=_seeds(labels, alone),
        distilled=_seeds(distilled, with_teacher),
        difference=paired_interval(with_teacher, alone, floor=terms.floor),
        room=mean_interval([sign * (teacher - value) for value in alone]),
        p=paired_p(with_teacher, alone, floor=terms.floor),
    )


def _seeds(rows: Sequence[Evaluation], runs: Sequence[float]) -> Seeds:
    means = {
        name: sum(row.metrics[name] for row in rows) / len(rows)
        for name in rows[0].metrics
        if name.startswith(("val_", "test_"))
    }
    return Seeds(**vars(mean_interval(runs)), runs=tuple(runs), metrics=means)


def judge_sizes(
    sizes: Sequence[Size], seeds: Sequence[Sequence[int]], *, terms: Terms
) -> tuple[list[Size], Verdict]:
    """Return sizes with `p_holm` and `verdict`, and the verdict on all of them.

    A size helps, hurts, or gives no evidence at 5 %, by Holm for all sizes and their mean together;
    fewer than three pairs leave it unknown.

    Args:
        sizes: Sizes, the smallest first.
        seeds: Seeds of each size's pairs.
        terms: How differences are judged and written.
    """
    family = [
        Pairs.of(
            f"the distilled student of {short(size.parameters)} parameters",
            FROM_LABELS,
            dict(zip(own, size.distilled.runs, strict=True)),
            dict(zip(own, size.labels.runs, strict=True)),
        )
        for size, own in zip(sizes, seeds, strict=True)
    ]
    together = f"distilled students of {len(sizes)} sizes, taken together,"
    verdict = judge(family, terms=terms, together=together)
    words = {"better": "helps", "worse": "hurts", "none": "no evidence"}
    found = []
    for size, each in zip(sizes, verdict.comparisons, strict=True):
        few = len(size.labels.runs) < LEAST
        found.append(
            replace(size, p_holm=each.p, verdict="unknown" if few else words[each.outcome])
        )
    if len(sizes) > 1 and any(size.verdict != "unknown" for size in found):
        by_size = f"{_verdict(found)}, corrected for all {len(sizes) + 1} comparisons (Holm)"
        verdict = replace(verdict, sentences=(*verdict.sentences, by_size))
    return found, verdict


def describe_curve(sizes: Sequence[Size], *, mode: Mode = "max") -> list[str]:
    """Return why distillation may not help at some sizes.

    Args:
        sizes: Sizes with their verdicts.
        mode: Whether more of the metric is better, or less.
    """
    lines, beside = [], "below" if mode == "max" else "above"
    unsure = [size for size in sizes if size.verdict == "no evidence"]
    alone = [size for size in unsure if size.p is not None and size.p <= LEVEL]
    large = [size for size in unsure if not _has_room(size)]
    small = [size for size in unsure if _has_room(size)]
    if alone:
        lines.append(
            f"{_listed(alone)}: the interval leaves out 0, but among {len(sizes)} sizes looked at "
            "that may be chance; more seeds would show (confirm.seeds)"
        )
    if large:
        lines.append(
            f"{_listed(large)}: labels alone are not evidently {beside} the teacher: perhaps "
            "large enough without it"
        )
    if small:
        lines.append(
            f"{_listed(small)}: {beside} the teacher with labels alone and not evidently helped: "
            "too small to follow it, or too few seeds"
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
