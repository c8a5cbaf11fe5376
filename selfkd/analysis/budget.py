"""What distilling costs, what each served item saves, and when that has paid."""

from __future__ import annotations

import math
from dataclasses import dataclass

PASSES = 3.0
"""Forward passes that a training step costs: the backward pass is worth two (Kaplan et al.)."""
OPERATIONS = 2.0
"""Operations a parameter and item of a forward pass: a multiplication and an addition."""
LARGEST = 1e30
"""Largest figure, and the inverse of the smallest one: no product of them overflows."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """What distilling costs and saves; all costs in the unit of the given ones."""

    teacher_cost: float
    """Cost of the teacher's prediction of one item."""
    student_cost: float
    """Cost of the student's prediction of one item."""
    items: float
    """Number of training items whose teacher logits are cached."""
    views: float
    """Number of views of each item."""
    live: bool = False
    """Whether nothing is cached, as the teacher runs at each training step."""
    caching: float
    """Cost of caching the teacher logits, or of these steps."""
    training: float
    """Cost of all training of the student, that of the search included."""
    search: float | None = None
    """Cost of the trials that were not chosen, a part of `training`; None where it is not known."""
    teacher_training: float | None = None
    """Cost of training the teacher; None where it is not known."""
    counts_teacher: bool = False
    """Whether it is a part of `distilling`: it is not where the teacher is there already."""
    distilling: float
    """Cost of caching and training."""
    saving: float
    """Saving on each item that the student serves in the teacher's place."""
    gap: float | None = None
    """Score of the teacher less that of the student, in points."""
    point_value: float | None = None
    """What a point is worth on each served item."""
    gain: float
    """Saving on each served item, less what the gap costs."""
    break_even: float | None
    """Number of served items that pays for distilling; None where it never pays."""
    rate: float | None = None
    """Number of items that are served a day."""
    days: float | None = None
    """Number of days to the break-even at that rate."""
    volume: float | None = None
    """Number of items that will be served."""
    net: float | None = None
    """Gain at that volume, less the cost of distilling."""


def budget(
    *,
    teacher: float,
    student: float,
    items: float,
    per: float = 1.0,
    views: float = 1.0,
    live: bool = False,
    caching: float | None = None,
    training: float | None = None,
    epochs: float | None = None,
    trials: float = 1.0,
    search: float | None = None,
    teacher_training: float | None = None,
    counts_teacher: bool = False,
    gap: float | None = None,
    point_value: float | None = None,
    rate: float | None = None,
    volume: float | None = None,
) -> Budget:
    """Return what distilling costs, what each served item saves, and when that has paid.

        caching    = as given, else items views c_T, or live trials epochs items c_T
        training   = as given, else trials epochs items 3 c_S
        distilling = caching + training (+ training of the teacher, where it counts)
        saving     = c_T - c_S
        gain       = saving - value gap
        break-even = distilling / gain,    net(volume) = volume gain - distilling

    where c_T and c_S are the costs of one item: `teacher / per` and `student / per`. The teacher
    runs once on each view of each item, however many trials read the cached logits. A training
    step costs about three forward passes, as the backward pass costs two.

    Args:
        teacher: Cost of the teacher's predictions of `per` items (images, tokens).
        student: Cost of the student's predictions of `per` items.
        items: Number of items in the training data.
        per: Number of items that the two costs are for, 1e6 where they are per million.
        views: Number of views of each item, 1 without augmentation.
        live: Whether nothing is cached, as the teacher runs at each training step.
        caching: Cost of caching the teacher logits, or of these steps.
        training: Cost of all training of the student.
        epochs: Number of epochs of a trial, where the cost of training is not given.
        trials: Number of trainings of a student.
        search: Cost of the trials that were not chosen, where the cost of training is given.
        teacher_training: Cost of training the teacher.
        counts_teacher: Whether that is a part of the cost of distilling.
        gap: Score of the teacher less that of the student, in points; below 0 where it is better.
        point_value: What a point is worth on `per` served items.
        rate: Number of items that are served a day.
        volume: Number of items that will be served.

    Raises:
        ValueError: A figure is not finite, not above 0 (costs of training may be 0, the gap
            below), or beyond all measure; neither `training` nor `epochs` is given; or only one of
            `gap` and `point_value`.

    >>> plan = budget(teacher=10, student=0.5, per=1e6, items=1e9, training=1000)
    >>> plan.distilling, round(plan.break_even / 1e9, 2)
    (11000.0, 1.16)
    >>> plan = budget(
    ...     teacher=10, student=0.5, per=1e6, items=1e9, training=1000, gap=1.5, point_value=3
    ... )
    >>> round(plan.break_even / 1e9, 2)
    2.2

    Reference:
        Kaplan et al., "Scaling Laws for Neural Language Models", 2020, section 2.1 (the backward
        pass takes twice the compute of the forward pass), https://arxiv.org/abs/2001.08361
    """
    above: dict[str, float | None] = {"teacher": teacher, "student": student, "items": items}
    above |= {"per": per, "views": views, "trials": trials, "epochs": epochs, "volume": volume}
    above |= {"point_value": point_value, "rate": rate}
    for name, value in above.items():
        check_figure(name, value)
    free = {
        "caching": caching,
        "training": training,
        "search": search,
        "teacher_training": teacher_training,
    }
    for name, value in free.items():
        if value is not None and not (value >= 0 and math.isfinite(value)):
            raise ValueError(f"{name} must be a finite number, 0 or more, got {value}")
        check_figure(name, value or None)
    _check_gap(gap, point_value)
    teacher_cost, student_cost = teacher / per, student / per
    if training is None:
        if epochs is None:
            raise ValueError("training must be given, or epochs to compute it from, got neither")
        one = epochs * items * PASSES * student_cost
        training, search = trials * one, max(trials - 1, 0.0) * one
    if caching is None:
        passes = trials * (epochs or 1.0) if live else views
        caching = items * passes * teacher_cost
    distilling = caching + training + (teacher_training or 0.0 if counts_teacher else 0.0)
    saving = teacher_cost - student_cost
    gain = saving - (gap or 0.0) * (point_value or 0.0) / per
    break_even = distilling / gain if gain > 0 else None
    return Budget(
        teacher_cost=teacher_cost,
        student_cost=student_cost,
        items=items,
        views=views,
        live=live,
        caching=caching,
        training=training,
        search=search,
        teacher_training=teacher_training,
        counts_teacher=counts_teacher,
        distilling=distilling,
        saving=saving,
        gap=gap,
        point_value=None if point_value is None else point_value / per,
        gain=gain,
        break_even=break_even,
        rate=rate,
        days=None if rate is None or break_even is None else break_even / rate,
        volume=volume,
        net=None if volume is None else volume * gain - distilling,
    )


def check_figure(name: str, value: float | None) -> None:
    """Check a figure that is above 0 and finite, or not given.

    Raises:
        ValueError: It is not, or beyond all measure.
    """
    if value is None:
        return
    if not (value > 0 and math.isfinite(value)):
        raise ValueError(f"{name} must be a finite number above 0, got {value}")
    if not 1 / LARGEST <= value <= LARGEST:
        raise ValueError(f"{name} must be from {1 / LARGEST:g} to {LARGEST:g}, got {value}")


def _check_gap(gap: float | None, point_value: float | None) -> None:
    if gap is not None and not abs(gap) <= LARGEST:
        raise ValueError(f"gap must be a finite number of points, got {gap}")
    if point_value is not None and gap is None:
        raise ValueError(f"gap must be given with point_value, got point_value {point_value} alone")


def describe_budget(
    plan: Budget, *, unit: str = "item", of: str = "cost", points: str = "points"
) -> str:
    """Return a budget as one sentence.

    Args:
        plan: Budget to describe.
        unit: Word for what is served.
        of: What its costs are: `cost`, `hours` or `operations`.
        points: Unit of the gap.

    >>> plan = budget(teacher=10, student=0.5, per=1e6, items=1e9, training=1000)
    >>> describe_budget(plan, unit="token")
    'distilling costs 11,000 and has paid for itself after 1.16 billion served tokens'
    >>> plan = budget(teacher=200, student=20, items=1e9, epochs=1, rate=1e8)
    >>> describe_budget(plan, unit="token", of="operations")
    'distilling takes 260 billion operations and has paid for itself after 1.44 billion served \
tokens, in 14.44 days at 100 million a day'
    """
    show = large if of == "operations" else amount
    in_all = f"costs {show(plan.distilling)}"
    if of == "operations":
        in_all = f"takes {show(plan.distilling)} operations"
    gap = "" if plan.gap is None else f"the gap of {gap_text(plan.gap, points)}"
    if plan.break_even is None:
        why = "the student is as dear as the teacher"
        if plan.saving < 0:
            why = "the student is dearer than the teacher"
        elif plan.gain < plan.saving:
            lost = plan.saving - plan.gain
            why = f"{gap} costs {show(lost)} per {unit}, and {show(plan.saving)} is saved"
        return f"distilling {in_all} and never pays: {why}, there is no break-even"
    text = f"distilling {in_all} and has paid for itself after {large(plan.break_even)} served "
    text += f"{unit}s"
    if plan.rate is not None and plan.days is not None:
        text += f", in {amount(plan.days)} days at {large(plan.rate)} a day"
    if plan.point_value is not None:
        text += f", {gap} counted"
    if plan.volume is None or plan.net is None:
        return text
    gain = "saves" if plan.net >= 0 else "still loses"
    return f"{text}; at {large(plan.volume)} it {gain} {show(abs(plan.net))}"


def gap_text(gap: float, points: str) -> str:
    """Return a gap with its unit.

    >>> gap_text(1.0, "points"), gap_text(0.5, "nats")
    ('1 point', '0.5 nats')
    """
    return f"{gap:,.3g} {points.removesuffix('s') if gap == 1 else points}"


def amount(value: float) -> str:
    """Return a cost: whole from 1,000 on, else four digits.

    >>> amount(11_000), amount(0.00012345)
    ('11,000', '0.0001234')
    """
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:,.4g}"


def large(value: float) -> str:
    """Return a number in words from a million on.

    >>> large(1.1579e9), large(3e21), large(-2e6)
    ('1.16 billion', '3e+21', '-2 million')
    """
    for name, size in (("trillion", 1e12), ("billion", 1e9), ("million", 1e6)):
        if size <= abs(value) < 1e15:
            return f"{value / size:.3g} {name}"
    return whole(value) if abs(value) >= 100 else f"{value:.4g}"


def whole(value: float) -> str:
    """Return a whole number.

    >>> whole(1_157_894_736.8)
    '1,157,894,737'
    """
    return f"{value:,.0f}" if abs(value) < 1e15 else f"{value:.4g}"
