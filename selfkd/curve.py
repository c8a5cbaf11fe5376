"""Accuracy against size, with labels only and distilled: what it says, and in which words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from selfkd.console import short
from selfkd.jobs import Row
from selfkd.statistics import Interval, holm, mean_interval, paired_p

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


def tell_curve(sizes: Sequence[Row]) -> str:
    """Return in words where distillation helps, and why it does not elsewhere."""
    if all(size["verdict"] == "unknown" for size in sizes):
        return "one seed: no interval, so nothing is said of where distillation helps"
    parts = []
    helps = _ranges(sizes, "helps")
    hurts = _ranges(sizes, "hurts")
    if helps:
        parts.append(f"distillation helps {helps}")
    if hurts:
        parts.append(f"distillation hurts {hurts}")
    if not helps and not hurts:
        parts.append(
            "no evidence that distillation helps at any of the sizes, "
            f"{_ranges(sizes, 'no evidence')}"
        )
    elif any(size["verdict"] not in ("helps", "hurts") for size in sizes):
        parts.append("no evidence outside")
    told = "; ".join(parts)
    large = [size for size in sizes if size["verdict"] == "no evidence" and not _has_room(size)]
    small = [size for size in sizes if size["verdict"] == "no evidence" and _has_room(size)]
    if large:
        told += (
            f". Large enough without a teacher, as far as these seeds tell: {_listed(large)} "
            "(labels alone are not evidently below the teacher)"
        )
    if small:
        told += (
            f". Below the teacher with labels alone, and not evidently helped: {_listed(small)} "
            "(too small to follow it, or too few seeds to see)"
        )
    return told


def _has_room(size: Row) -> bool:
    """Say whether labels only are evidently below the teacher."""
    low = size["room"]["low"]
    return low is not None and low > 0


def _listed(sizes: Sequence[Row]) -> str:
    return ", ".join(short(size["parameters"]) for size in sizes) + " parameters"


def _ranges(sizes: Sequence[Row], verdict: str) -> str:
    """Return where a verdict holds: `from 3 k to 12 k parameters, at 50 k parameters`."""
    groups: list[list[Row]] = []
    before: Any = None
    for size in sizes:
        if size["verdict"] == verdict:
            if before != verdict:
                groups.append([])
            groups[-1].append(size)
        before = size["verdict"]
    ends = [(short(group[0]["parameters"]), short(group[-1]["parameters"])) for group in groups]
    return " and ".join(
        f"at {first} parameters" if first == last else f"from {first} to {last} parameters"
        for first, last in ends
    )
