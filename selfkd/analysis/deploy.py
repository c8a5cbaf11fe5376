"""What is deployed, in words: what it saves in size and time, and what it costs in quality."""

from __future__ import annotations

import re
from collections.abc import Iterator

from selfkd.analysis.kept import describe_kept, score_kept
from selfkd.analysis.statistics import mean_interval, paired_interval
from selfkd.analysis.verdicts import (
    count,
    describe_difference,
    format_difference,
    is_better,
    join,
    number,
    resolution,
)
from selfkd.results import (
    DeployRow,
    DeploySummary,
    Facts,
    Interval,
    Metric,
    Row,
    Timing,
    find_metric,
)

REFERENCE = "float"
"""Key of the row that all others are compared to."""
DISTILLED = "_distilled"
"""End of the key of a row whose models are distilled; that of the same from labels is `_labels`."""
SAME = 0.995
"""Ratio from which on a file counts as not smaller: two digits show it as 1."""


def size_ratio(row: DeployRow, summary: DeploySummary) -> float | None:
    """Return the size of a row's file in sizes of the float file; None where there is none."""
    of = _find_row(summary, REFERENCE)
    if row.key == REFERENCE or of is None or not of.bytes or row.bytes is None:
        return None
    return row.bytes / of.bytes


def difference_of(row: DeployRow, summary: DeploySummary, facts: Facts) -> Interval | None:
    """Return the difference of a row's test metric to the float file's, over its seeds if any.

    Args:
        row: Row of a form.
        summary: Deployment that it is of.
        facts: Facts of the data, which say how many items the metric is a mean over.

    >>> of = DeployRow(key="float", title="", metrics={"test_nll": 0.5})
    >>> row = DeployRow(key="fresh", title="", values=(0.75, 0.75))
    >>> summary = DeploySummary(model="", title="", metric="nll", rows=(of, row), served="float")
    >>> difference_of(row, summary, Facts()).value
    0.25
    """
    of = _find_row(summary, REFERENCE)
    value = None if of is None else of.metric(f"test_{summary.metric}")
    if row.difference is not None or not row.values or value is None:
        return row.difference
    floor = resolution(facts, summary.metric, "test")
    return mean_interval([own - value for own in row.values], floor=floor)


def kept_of(row: DeployRow, summary: DeploySummary) -> Interval | None:
    """Return which share of the float file's test score a row keeps, over its seeds if any.

    >>> of = DeployRow(key="float", title="", metrics={"test_accuracy": 0.8})
    >>> row = DeployRow(key="int8", title="", metrics={"test_accuracy": 0.4})
    >>> rows = (of, row)
    >>> kept_of(row, DeploySummary(model="", title="", metric="accuracy", rows=rows, served=""))
    Interval(value=0.5, low=None, high=None)
    """
    of = _find_row(summary, REFERENCE)
    if row.key == REFERENCE or of is None:
        return None
    reference = of.metric(f"test_{summary.metric}")
    return score_kept(_scores(row, summary), reference, metric=summary.metric)


def _scores(row: DeployRow, summary: DeploySummary) -> tuple[float, ...]:
    """Return the test metric of a row, of each of its seeds."""
    value = row.metric(f"test_{summary.metric}")
    return row.values or (() if value is None else (value,))


def drop_of(row: DeployRow, before: DeployRow, name: str) -> float | None:
    """Return how much worse a row is on validation, in points of a fraction, else in nats.

    Args:
        row: Row that is judged.
        before: Row of the float file.
        name: Metric, without its split.

    Returns:
        The difference, above 0 where the row is worse; None where one was not measured.

    >>> before = DeployRow(key="float", title="", metrics={"val_nll": 0.5, "val_accuracy": 0.9})
    >>> row = DeployRow(key="int8", title="", metrics={"val_nll": 0.75, "val_accuracy": 0.87})
    >>> drop_of(row, before, "nll"), round(drop_of(row, before, "accuracy"), 6)
    (0.25, 3.0)
    """
    metric = find_metric(name)
    found, known = row.metric(f"val_{name}"), before.metric(f"val_{name}")
    if found is None or known is None:
        return None
    worse = known - found if metric.mode == "max" else found - known
    return 100 * worse if metric.is_fraction else worse


def _is_faster(timing: Timing) -> bool:
    """Say whether a batch is predicted faster than by the float file, beyond noise.

    >>> _is_faster(Timing(items=1, ms=1.0, speed_up=Interval(1.2, 0.9, 1.5)))
    False
    """
    found = timing.speed_up
    return found is not None and (found.value if found.low is None else found.low) > 1


def shortfalls(row: DeployRow, summary: DeploySummary) -> str:
    """Return in words what a row does not improve over the float file; empty where it is that file.

    >>> timings = tuple(Timing(items=n, ms=1.0, speed_up=Interval(n)) for n in (1, 128))
    >>> rows = DeployRow(key="float", title="ONNX float", bytes=9), DeployRow(
    ...     key="int8", title="ONNX int8", bytes=9, timings=timings)
    >>> summary = DeploySummary(model="", title="", metric="accuracy", rows=rows, served="int8")
    >>> shortfalls(rows[1], summary)
    'not smaller/faster at 1'
    """
    ratio = size_ratio(row, summary)
    compared = [timing for timing in row.timings if timing.speed_up is not None]
    slow = [timing.items for timing in compared if not _is_faster(timing)]
    parts = ["smaller"] if ratio is not None and ratio >= SAME else []
    if slow:
        some = f" at {join([str(items) for items in slow])}" if len(slow) < len(compared) else ""
        parts.append(f"faster{some}")
    return f"not {'/'.join(parts)}" if parts else ""


def _find_row(summary: DeploySummary, key: str) -> DeployRow | None:
    """Return the row of a key; None where there is none."""
    return next((row for row in summary.rows if row.key == key), None)


def flat_row(row: DeployRow) -> Row:
    """Return a row as plain values by name; None of what is not known.

    >>> row = DeployRow(key="int8", title="ONNX int8", metrics={"test_accuracy": 0.5}, bytes=9,
    ...     timings=(Timing(items=1, ms=0.5, speed_up=Interval(2.0, 1.5, 2.5)),))
    >>> {name: value for name, value in flat_row(row).items() if value is not None}
    ... # doctest: +NORMALIZE_WHITESPACE
    {'name': 'ONNX int8', 'test_accuracy': 0.5, 'bytes': 9, 'ms_1': 0.5, 'speed_1': 2.0,
     'speed_1_low': 1.5, 'speed_1_high': 2.5}
    """
    named = {
        "mean": mean_interval(row.values) if row.values else None,
        "difference": row.difference,
        **{f"speed_{timing.items}": timing.speed_up for timing in row.timings},
    }
    ends = {
        name: {name: of.value, f"{name}_low": of.low, f"{name}_high": of.high}
        for name, of in named.items()
        if of is not None
    }
    found: Row = {"name": row.title, **row.metrics}
    found |= {**ends.pop("mean", {}), **ends.pop("difference", {}), "agreement": row.agreement}
    found |= {"seeds": len(row.seeds) or None, "bytes": row.bytes}
    for timing in row.timings:
        found |= {f"ms_{timing.items}": timing.ms, **ends.get(f"speed_{timing.items}", {})}
    return found | {"tokens_a_second": row.tokens_a_second, "parameters": row.parameters}


def deploy_sentences(summary: DeploySummary, facts: Facts, *, short: bool = False) -> list[str]:
    """Return what a deployment found, the headline first.

    Args:
        summary: Rows that were measured.
        facts: Facts of the data, which say what metrics are means over.
        short: Whether what a table shows as well is left out.
    """
    headline = list(_headline(summary, facts))
    rows = [*_of_others(summary, facts), *_of_torch(summary), *_of_operators(summary)]
    return [
        *(headline if short else [*headline, *rows]),
        *_of_kept(summary),
        *_of_training(summary, facts),
        *_of_ensemble(summary, facts),
        *_of_machine(summary),
        *_remarks(summary),
    ]


def _headline(summary: DeploySummary, facts: Facts) -> Iterator[str]:
    """Yield what is not written for its cost, and what is served, beside the float model."""
    row, name = _find_row(summary, summary.served), summary.title
    if summary.exceeded:
        yield from _left_out(summary)
    if row is not None and row.key != REFERENCE:
        ratio = size_ratio(row, summary)
        parts = ["" if ratio is None else _size(ratio), _speed(row, ends=False)]
        parts.append(_cost(row, summary, facts, short=True))
        yield f"{name} is served as {row.title}: " + "; ".join(part for part in parts if part)
    elif not summary.exceeded:
        yield f"{name} is served in float"


def _left_out(summary: DeploySummary) -> Iterator[str]:
    """Yield each file that is worse on validation than `deploy.max_drop` allows."""
    most, bits = summary.options.get("max_drop"), summary.options.get("bits")
    than = "" if most is None else f", more than the {most:g} of deploy.max_drop"
    drops = [("int8.onnx", summary.drop)]
    before, low = _find_row(summary, REFERENCE), _find_row(summary, f"bits{bits}")
    if before is not None and low is not None:
        drops.append((f"int{bits}.onnx", drop_of(low, before, summary.metric)))
    for name, drop in drops:
        if name not in summary.files and drop is not None:
            unit = find_metric(summary.metric).unit or summary.metric
            worse = f"{number(drop, '.3g')} {unit} worse than the float model on validation"
            yield f"no {name} of {summary.title} is written: it is {worse}{than}"


def _describe_row(row: DeployRow, summary: DeploySummary, facts: Facts) -> str:
    """Return a row in words: its size, its speed, what it costs in the metric, its agreement."""
    ratio = size_ratio(row, summary)
    parts = ["" if ratio is None else _size(ratio), _speed(row), _tokens(row, summary)]
    parts.append(_cost(row, summary, facts))
    if row.agreement is not None:
        parts.append(f"agreement {number(row.agreement, '.2%')}")
    return f"{row.title}: " + "; ".join(part for part in parts if part)


def _size(ratio: float) -> str:
    no = "" if ratio < SAME else "not smaller, "
    return f"{no}{number(ratio, '.2f')} of the float file's size"


def _speed(row: DeployRow, *, ends: bool = True) -> str:
    """Return how fast a row is: batches at which it is faster first, then the others."""
    known = [timing for timing in row.timings if timing.speed_up is not None]
    named = (("faster", True), ("not faster", False))
    parts = [
        (name, join([_times(t, ends=ends) for t in known if _is_faster(t) == faster]))
        for name, faster in named
    ]
    return "; ".join(f"{name}: {times}" for name, times in parts if times)


def _times(timing: Timing, *, ends: bool) -> str:
    """Return how many times as fast a batch is: `3.20x [3.10, 3.30] at batch 128`."""
    found = timing.speed_up or Interval(1.0)
    low, high = found.low, found.high
    text = f"{format_ratio(found.value)}x"
    if ends and low is not None and high is not None:
        text += f" [{format_ratio(low)}, {format_ratio(high)}]"
    return f"{text} at batch {timing.items}"


def format_ratio(value: float) -> str:
    """Return how many times as much something is.

    >>> format_ratio(0.967), format_ratio(17.43)
    ('0.97', '17.4')
    """
    return number(value, ".1f" if abs(value) >= 10 else ".2f")


def _tokens(row: DeployRow, summary: DeploySummary) -> str:
    of = _find_row(summary, REFERENCE)
    if row.tokens_a_second is None:
        return ""
    beside = (
        "" if of is None or of.tokens_a_second is None else f" (float {of.tokens_a_second:,.0f})"
    )
    return f"{row.tokens_a_second:,.0f} tokens a second{beside}"


def _cost(row: DeployRow, summary: DeploySummary, facts: Facts, *, short: bool = False) -> str:
    """Return the test metric beside that of the float model, with its evidence."""
    metric, tested = find_metric(summary.metric), f"test_{summary.metric}"
    value, of = row.metric(tested), _find_row(summary, REFERENCE)
    if row.values:
        value = mean_interval(row.values).value
    if value is None:
        return ""
    text = f"test {metric.label} {metric.with_unit(value)}"
    difference = difference_of(row, summary, facts)
    if short and difference is not None:
        value_alone = format_difference(Interval(difference.value), form=metric.difference)
        return f"test {metric.label} {value_alone}{_evidence(row, difference, metric, '')}"
    reference = None if of is None else of.metric(tested)
    if reference is not None:
        text += f" (float {metric.with_unit(reference)})"
    if difference is not None:
        text += f", {format_difference(difference, form=metric.difference)}"
    return text + _evidence(row, difference, metric, _counted(row, facts))


def _counted(row: DeployRow, facts: Facts) -> str:
    """Return what the evidence of a row is of: seeds, or test items."""
    if row.seeds:
        return f" over {count(len(row.seeds), 'seed')}"
    items = facts.count("test")
    return f" on {items:,} test {facts.tested_on}" if items else ""


def _evidence(row: DeployRow, difference: Interval | None, metric: Metric, on: str) -> str:
    """Return what the test split tells of a difference: McNemar's test, else its interval."""
    if row.mcnemar is not None and not row.seeds:
        test = row.mcnemar
        way = "fewer" if test.only_student > test.only_teacher else "more"
        found = f"{way} errors" if test.p < 0.05 else "no evidence of a difference"
        p = "< 0.001" if test.p < 0.001 else number(test.p, ".2g")
        return f": {found}{on} (McNemar p {p})"
    if difference is None or difference.low is None:
        return f"{on}, so no interval" if len(row.seeds) == 1 else ""
    if not re.search("[1-9]", format_difference(difference, form=metric.difference)):
        return f": no difference in these digits{on}"
    if is_better(difference, mode=metric.mode):
        return f": better{on}"
    worse = is_better(difference.reversed(), mode=metric.mode)
    return f": {'worse' if worse else 'no evidence of a difference'}{on}"


def _of_torch(summary: DeploySummary) -> Iterator[str]:
    """Yield how much faster the exported graph is than eager torch."""
    row, of = _find_row(summary, "torch"), _find_row(summary, REFERENCE)
    if row is None or of is None:
        return
    found = [
        f"{format_ratio(1 / timing.speed_up.value)}x as fast at batch {timing.items}"
        for timing in row.timings
        if timing.speed_up is not None and timing.speed_up.value > 0
    ]
    if found:
        yield f"{of.title} is {join(found)}, compared with eager torch"


def _of_operators(summary: DeploySummary) -> Iterator[str]:
    """Yield how many operators compute in low precision."""
    for row in summary.rows:
        if row.operators:
            parts = [f"{number:,} {kind}" for kind, number in row.operators.items()]
            yield f"{row.title} computes in low precision: {join(parts)}"


def _of_others(summary: DeploySummary, facts: Facts) -> Iterator[str]:
    """Yield what rows save and cost; of those trained on seeds, the distilled one."""
    for row in summary.rows:
        known = row.key in ("torch", REFERENCE, "ensemble")
        if not known and (not row.seeds or row.key.endswith(DISTILLED)):
            yield _describe_row(row, summary, facts)


def _of_training(summary: DeploySummary, facts: Facts) -> Iterator[str]:
    """Yield what distillation restores, seed by seed, beside labels and a fresh student."""
    metric = find_metric(summary.metric)
    floor = resolution(facts, summary.metric, "test")
    for row in summary.rows:
        stem, found, _ = row.key.partition(DISTILLED)
        others = (f"{stem}_labels", "fresh" if stem == "pruned" else "") if found else ()
        for other in (_find_row(summary, key) for key in others):
            pairs = _pairs(row, other)
            if other is None or not pairs:
                continue
            difference = paired_interval(*zip(*pairs, strict=True), floor=floor)
            yield describe_difference(
                row.title,
                other.title,
                difference,
                count(len(pairs), "paired seed"),
                mode=metric.mode,
                form=metric.difference,
            )


def _of_kept(summary: DeploySummary) -> Iterator[str]:
    """Yield which share of the score what is served keeps, and a distilled model, at which size."""
    of = _find_row(summary, REFERENCE)
    for row in summary.rows:
        served = row.key == summary.served or row.key.endswith(DISTILLED)
        if of is not None and served and kept_of(row, summary) is not None:
            yield describe_kept(
                row.title,
                "the float file",
                _scores(row, summary),
                of.metric(f"test_{summary.metric}"),
                metric=summary.metric,
                size=size_ratio(row, summary),
                of="size",
            )


def _pairs(row: DeployRow, other: DeployRow | None) -> list[tuple[float, float]]:
    """Return the values of two rows on the seeds that both have."""
    if other is None:
        return []
    known = dict(zip(other.seeds, other.values, strict=False))
    own = zip(row.seeds, row.values, strict=False)
    return [(value, known[seed]) for seed, value in own if seed in known]


def _of_ensemble(summary: DeploySummary, facts: Facts) -> Iterator[str]:
    """Yield what the ensemble costs beside the single student."""
    row, of = _find_row(summary, "ensemble"), _find_row(summary, REFERENCE)
    if row is None or of is None:
        return
    parts = []
    ratio = size_ratio(row, summary)
    if ratio is not None:
        parts.append(f"{format_ratio(ratio)} times the size")
    parts += [
        f"{format_ratio(1 / timing.speed_up.value)} times the time at batch {timing.items}"
        for timing in row.timings
        if timing.speed_up is not None and timing.speed_up.value > 0
    ]
    cost = _cost(row, summary, facts)
    yield f"{row.title} costs {join(parts)} of {of.title}" + (f"; {cost}" if cost else "")


def _of_machine(summary: DeploySummary) -> Iterator[str]:
    """Yield what it was measured on."""
    versions = ", ".join(f"{name} {version}" for name, version in summary.versions.items())
    parts = [part for part in (summary.cpu, versions) if part]
    if parts:
        yield f"times are of a whole batch on one thread, side by side, on {'; '.join(parts)}"


def _remarks(summary: DeploySummary) -> Iterator[str]:
    """Yield what a reader must know further: of size and speed the rows say it themselves."""
    for row in summary.rows:
        for remark in row.remarks:
            if not remark.startswith(("not smaller", "not faster")):
                yield f"{row.title}: {remark}"
    yield from summary.remarks
