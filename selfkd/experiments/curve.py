"""Accuracy against size, with labels only and distilled: what it says, and in which words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict

import numpy as np

from selfkd.analysis.statistics import Interval, holm, mean_interval, paired_p
from selfkd.analysis.verdicts import short, tell
from selfkd.results import Row

SIGNIFICANT = 0.05


def compare_size(labels: Sequence[Row], taught: Sequence[Row], teacher: float) -> Row:
    """Return what a size is worth with labels only and taught.

    Args:
        labels: measured students, one a seed.
        taught: on the same seeds in the same order.
        teacher: test accuracy of the teacher.
    """
    alone, with_teacher = ([row["test_accuracy"] for row in rows] for rows in (labels, taught))
    return {
        "labels": _arm(labels),
        "taught": _arm(taught),
        "difference": asdict(
            mean_interval([b - a for a, b in zip(alone, with_teacher, strict=True)])
        ),
        "room": asdict(mean_interval([teacher - value for value in alone])),
        "p": paired_p(with_teacher, alone),
    }


def _arm(rows: Sequence[Row]) -> Row:
    runs = [row["test_accuracy"] for row in rows]
    interval: Interval = mean_interval(runs)
    val = sum(row["val_accuracy"] for row in rows) / len(rows)
    nll = sum(row["test_nll"] for row in rows) / len(rows)
    return {**asdict(interval), "runs": runs, "val_accuracy": val, "test_nll": nll}


def judge(sizes: Sequence[Row]) -> None:
    """Write `p_holm` and `verdict` into the sizes: helps, hurts, no evidence, or unknown.

    The verdict is Holm's at 5 % over all sizes looked at; unknown is what has a single pair.
    """
    tested = [size for size in sizes if size["p"] is not None]
    for size, corrected in zip(tested, holm([size["p"] for size in tested]), strict=True):
        size["p_holm"] = corrected
        if corrected > SIGNIFICANT:
            size["verdict"] = "no evidence"
        else:
            size["verdict"] = "helps" if size["difference"]["value"] > 0 else "hurts"
    for size in sizes:
        if size["p"] is None:
            size["p_holm"] = None
            single = len(size["labels"]["runs"]) == 1
            size["verdict"] = "unknown" if single else "no evidence"


def mean_gain(sizes: Sequence[Row]) -> Row | None:
    """Return the difference averaged over all sizes, with its interval over seeds.

    Sizes share their seeds, so each seed gives one mean; a single question, nothing to correct.
    None where a size lacks a seed.
    """
    gains = [np.subtract(size["taught"]["runs"], size["labels"]["runs"]).tolist() for size in sizes]
    if len({len(of_size) for of_size in gains}) != 1:
        return None
    return asdict(mean_interval(np.mean(gains, axis=0).tolist()))


def tell_curve(sizes: Sequence[Row], gain: Row | None) -> list[str]:
    """Return in words where distillation helps, on average, and why it does not elsewhere.

    Args:
        sizes: judged.
        gain: `mean_gain` of them.

    Returns:
        The verdict, and what else there is to say.
    """
    if all(size["verdict"] == "unknown" for size in sizes):
        return ["one seed: no interval, so nothing is said of where distillation helps"]
    lines = [_verdict(sizes)]
    if gain is not None and gain["low"] is not None and len(sizes) > 1:
        sure = "it helps" if gain["low"] > 0 else "it hurts" if gain["high"] < 0 else "no evidence"
        lines.append(f"on average over the {len(sizes)} sizes: {tell(gain)}, {sure}")
    unsure = [size for size in sizes if size["verdict"] == "no evidence"]
    alone = [size for size in unsure if size["p"] is not None and size["p"] <= SIGNIFICANT]
    large = [size for size in unsure if not _has_room(size)]
    small = [size for size in unsure if _has_room(size)]
    if alone:
        lines.append(
            f"{_listed(alone)}: the interval leaves out 0, but among {len(sizes)} sizes looked at "
            "that may be chance; more seeds would tell (confirm.seeds)"
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


def _verdict(sizes: Sequence[Row]) -> str:
    helps, hurts = _ranges(sizes, "helps"), _ranges(sizes, "hurts")
    parts = [f"distillation helps {helps}"] if helps else []
    parts += [f"distillation hurts {hurts}"] if hurts else []
    if not parts:
        return f"no evidence that distillation helps at any one size {_ranges(sizes)}"
    if any(size["verdict"] not in ("helps", "hurts") for size in sizes):
        parts.append("no evidence outside")
    return "; ".join(parts)


def _has_room(size: Row) -> bool:
    """Say whether labels only are evidently below the teacher."""
    low = size["room"]["low"]
    return low is not None and low > 0


def _listed(sizes: Sequence[Row]) -> str:
    return ", ".join(short(size["parameters"]) for size in sizes) + " parameters"


def _ranges(sizes: Sequence[Row], verdict: str | None = None) -> str:
    """Return where a verdict holds, or any: `from 3 k to 12 k parameters and at 50 k …`."""
    groups: list[list[Row]] = []
    before = False
    for size in sizes:
        holds = verdict in (None, size["verdict"])
        if holds and not before:
            groups.append([])
        if holds:
            groups[-1].append(size)
        before = holds
    ends = [(short(group[0]["parameters"]), short(group[-1]["parameters"])) for group in groups]
    return " and ".join(
        f"at {first} parameters" if first == last else f"from {first} to {last} parameters"
        for first, last in ends
    )
