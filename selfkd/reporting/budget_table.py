"""The table of a budget: what distilling costs and saves, in money or hours and in operations."""

from __future__ import annotations

from collections.abc import Callable

from rich.box import SIMPLE_HEAD
from rich.table import Table

from selfkd.analysis.budget import Budget, amount, gap_text, large, whole


def make_budget_table(
    plan: Budget,
    *,
    unit: str = "item",
    per: float = 1.0,
    of: str = "cost",
    operations: Budget | None = None,
    points: str = "points",
) -> Table:
    """Return the table of a budget; costs of an item are shown for `per` of them.

    Args:
        plan: Budget in the main unit.
        unit: Word for what is served.
        per: Number of items that costs of an item are shown for.
        of: What its costs are: `cost`, `hours` or `operations`.
        operations: The same in operations, as a second column.
        points: Unit of the gap.
    """
    columns = {of: plan} | ({} if operations is None else {"operations": operations})
    table = Table(
        box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False, show_header=len(columns) > 1
    )
    table.add_column("", justify="left")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    shows = [large if name == "operations" else amount for name in columns]
    rows: dict[str, list[str]] = {}
    for place, (own, show) in enumerate(zip(columns.values(), shows, strict=True)):
        for name, text in _rows(own, show, unit, per, points).items():
            rows.setdefault(name, [""] * len(columns))[place] = text
    for name, texts in rows.items():
        table.add_row(name, *texts)
    return table


def _rows(
    plan: Budget, show: Callable[[float], str], unit: str, per: float, points: str
) -> dict[str, str]:
    """Return the cells of a column by the names of their rows, in order."""
    each = f"per {unit}" if per == 1 else f"per {large(per).removeprefix('1 ')} {unit}s"
    views = "" if plan.views == 1 else f" in {amount(plan.views)} views"
    caching = f"caching teacher logits of {large(plan.items)} {unit}s{views}, once"
    if plan.live:
        caching = "running the teacher at each training step"
    counted = "training of the teacher" + ("" if plan.counts_teacher else ", not counted")
    rows: dict[str, float | str | None] = {
        f"teacher, {each}": plan.teacher_cost * per,
        f"student, {each}": plan.student_cost * per,
        counted: plan.teacher_training,
        caching: plan.caching or None,  # within the training where times are measured live
    }
    if plan.search is None:
        rows["training of the student, all of it"] = plan.training
    else:
        rows["training of the student"] = plan.training - plan.search
        rows["search: its other trials"] = plan.search or None
    rows |= {
        "distilling, all of that": plan.distilling,
        f"saving, {each} served": plan.saving * per,
    }
    if plan.gap is not None and plan.point_value is not None:
        rows[f"gap of {gap_text(plan.gap, points)}, {each} served"] = (
            plan.saving - plan.gain
        ) * per
    even = "never" if plan.break_even is None else whole(plan.break_even)
    rows[f"break-even, {unit}s served"] = even
    if plan.rate is not None:
        days = "never" if plan.days is None else amount(plan.days)
        rows[f"days, at {large(plan.rate)} {unit}s a day"] = days
    if plan.volume is not None:
        rows[f"net after {large(plan.volume)} {unit}s"] = plan.net
    return {k: v if isinstance(v, str) else show(v) for k, v in rows.items() if v is not None}
