"""Metrics by name: what each is called, which way is better, how its values are written.

A task names its metrics in its `Facts`: the one that its models are compared by, `metric`, and the
further ones of its tables, `further`. Rows have them with the split before them, as `test_nll`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

Mode = Literal["max", "min"]

SPLITS = {"val_": "validation ", "test_": "test "}
AGREEMENT = "agreement"
TIE = "val_nll"
"""Metric that breaks ties of what is chosen by, where it is measured; less is better."""


@dataclass(frozen=True)
class Metric:
    """A metric as tables, reports, verdicts and W&B show it."""

    name: str
    """Name in rows, without the split before it."""
    label: str
    """Name in sentences and on axes."""
    short: str
    """Name in the head of a column."""
    mode: Mode = "max"
    """Whether more of it is better, or less."""
    unit: Literal["points", "nats", "bits", ""] = ""
    """Unit of a difference; points are hundredths of a fraction, which itself is in percent."""
    form: str = ".4g"
    """Format of a value."""
    cell: str = ".4f"
    """Format of a value in a further column of a table."""
    step: str = "+.4g"
    """Format of a difference; of a fraction, in points."""
    zero: bool = True
    """Whether 0 is worth a cell of a table."""

    @property
    def is_fraction(self) -> bool:
        """Whether it is a fraction of the items, such as an accuracy."""
        return self.unit == "points"

    def value(self, value: float) -> str:
        """Return a value as text; a dash for NaN and infinity.

        >>> find_metric("accuracy").value(0.934), find_metric("nll").value(1.234)
        ('93.40%', '1.234')
        """
        return _number(value, self.form)

    def with_unit(self, value: float) -> str:
        """Return a value as text with its unit.

        >>> find_metric("nll").with_unit(1.234), find_metric("accuracy").with_unit(0.5)
        ('1.234 nats', '50.00%')
        """
        return self.value(value) + (f" {self.unit}" if self.unit == "nats" else "")

    def bare(self, value: float) -> str:
        """Return a difference as text without its unit, for a column whose head has it."""
        return _number(100 * value if self.is_fraction else value, self.step)

    def difference(self, value: float) -> str:
        """Return a difference as text with its unit.

        >>> find_metric("accuracy").difference(0.0061), find_metric("nll").difference(-0.26)
        ('+0.61 points', '-0.260 nats')
        """
        return f"{self.bare(value)} {self.unit}".rstrip()


def _number(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "–"


def _nats(name: str, label: str, short: str) -> Metric:
    return Metric(name, label, short, "min", "nats", form="#.4g", step="+.3f")


def _fraction(name: str, label: str, short: str = "", mode: Mode = "max") -> Metric:
    return Metric(name, label, short or label, mode, "points", ".2%", ".2%", "+.2f")


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        _fraction("accuracy", "accuracy", "acc"),
        _fraction("token_accuracy", "token accuracy", "token acc"),
        _fraction("exact_match", "exact match"),
        _fraction("agreement", "teacher agreement", "agreement"),
        _nats("nll", "NLL", "NLL"),
        Metric("perplexity", "perplexity", "perplexity", "min", cell=".4g"),
        Metric("bits_per_byte", "bits per byte", "bits/byte", "min", "bits", "#.4g", step="+.3f"),
        _nats("kl", "KL to the teacher", "KL"),
        _nats("own_nll", "own NLL", "own NLL"),
        _fraction("draft_acceptance", "draft acceptance", "drafts kept"),
        *(_fraction(f"distinct_{n}", f"distinct {n}-grams", f"distinct-{n}") for n in (1, 2, 3)),
        replace(_fraction("unended", "texts without an end", "no end", "min"), zero=False),
        Metric("ece", "ECE", "ECE", "min"),
        Metric("brier", "Brier score", "Brier", "min"),
    )
}


def find_metric(name: str) -> Metric:
    """Return the metric of a name, with or without a split before it.

    Of a name that is not known, as of a user's training function, more is better unless the config
    says otherwise; with "acc" in it, it is a fraction.

    >>> find_metric("test_bits_per_byte").label, find_metric("val_f1").label
    ('bits per byte', 'val_f1')
    """
    known = METRICS.get(name.removeprefix(_split(name)))
    if known is not None:
        return known
    return _fraction(name, name) if "acc" in name else Metric(name, name, name)


def is_measured(name: str) -> bool:
    """Say whether a key of a row is a known metric of a split.

    >>> is_measured("test_nll"), is_measured("nll"), is_measured("test_errors")
    (True, False, False)
    """
    split = _split(name)
    return bool(split) and name.removeprefix(split) in METRICS


def key_on_test(name: str) -> str:
    """Return the key of rows that a metric has on the test split; `agreement` is of no other.

    >>> key_on_test("nll"), key_on_test("agreement")
    ('test_nll', 'agreement')
    """
    return name if name == AGREEMENT else f"test_{name}"


def with_agreement(further: Sequence[str]) -> tuple[str, ...]:
    """Return further metrics with the teacher agreement after them, unless it is among them.

    >>> with_agreement(("nll",)), with_agreement(("agreement", "kl"))
    (('nll', 'agreement'), ('agreement', 'kl'))
    """
    return tuple(further) if AGREEMENT in further else (*further, AGREEMENT)


def find_main(metrics: Iterable[str]) -> str:
    """Return the metric that models are compared by: accuracy, else the first on the test split.

    >>> find_main(["val_nll", "val_token_accuracy", "test_nll", "test_token_accuracy"])
    'nll'
    """
    tested = [name.removeprefix("test_") for name in metrics if name.startswith("test_")]
    return "accuracy" if "accuracy" in tested or not tested else tested[0]


def title(name: str) -> str:
    """Return the name of a metric for people, with its split.

    >>> title("test_nll"), title("val_accuracy"), title("val_f1")
    ('test NLL', 'validation accuracy', 'validation f1')
    """
    split, metric = _split(name), find_metric(name)
    bare = name.removeprefix(split)
    known = metric.label if metric.name == bare else bare.replace("_", " ")
    return SPLITS.get(split, "") + known


def _split(name: str) -> str:
    return next((split for split in SPLITS if name.startswith(split)), "")
