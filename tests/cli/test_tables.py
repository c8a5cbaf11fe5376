"""The tables of generations as a command prints them: what was replicated comes first."""

from __future__ import annotations

import io
import re
from dataclasses import replace

from rich.console import Console

from selfkd.cli.tables import chosen_table, own_metrics_table, pick, summary_table
from selfkd.cli.terminal import print_table
from selfkd.reporting.tables import Table
from selfkd.results import (
    Confirmation,
    ControlResult,
    Evaluation,
    GenerationResult,
    GenerationsSummary,
    Interval,
    McNemar,
)

TESTED = {"val_accuracy": 0.9, "test_accuracy": 0.8125, "test_nll": 0.5, "test_ece": 0.01}
RESULT = GenerationResult(
    generation=1,
    trial=0,
    temperature=4.0,
    alpha=0.5,
    metrics={**TESTED, "agreement": 0.75},
    seconds=3.0,
)
FIRST = replace(RESULT, generation=0, temperature=None, alpha=None, metrics=TESTED)
ENSEMBLE = Evaluation(hash="", metrics={**TESTED, "test_accuracy": 0.99})
CONTROL = ControlResult(
    name="ensemble",
    title="ensemble of 11 seeds",
    seeds=(1, 2, 3),
    metric="test_accuracy",
    values=(),
    mean=Interval(0.9593, 0.95, 0.97),
    first=Interval(-0.1064, -0.1209, -0.0937),
)


def confirmation(generation: int, *, metric: str = "test_accuracy") -> Confirmation:
    later = generation > 0
    return Confirmation(
        generation=generation,
        seeds=(1, 2, 3),
        metric=metric,
        values=(0.95, 0.96, 0.97),
        mean=Interval(0.9593, 0.9545, 0.9641),
        first=Interval(0.0064, -0.0109, 0.0237) if later else None,
        previous=Interval(-0.0008) if later else None,
        mcnemar=McNemar(only_student=3, only_teacher=1, p=0.625) if later else None,
    )


def lines(table: Table, width: int = 80) -> list[str]:
    """The words of the printed lines that are no rule."""
    output = io.StringIO()
    print_table(Console(file=output, width=width), table)
    printed = output.getvalue().splitlines()
    assert max(map(len, printed)) <= width
    return [" ".join(line.split()) for line in printed if re.search(r"\w", line)]


def test_the_test_accuracy_over_fresh_seeds_and_the_gain_come_first_in_80_columns() -> None:
    summary = GenerationsSummary(
        generations=(FIRST, RESULT),
        confirmations=(confirmation(0), confirmation(1)),
        ensemble=ENSEMBLE,
        controls=(CONTROL,),
    )
    assert lines(summary_table(summary, "accuracy")) == [
        "generation test acc, 3 seeds gain, points T alpha",
        "0 95.93% ± 0.48%",
        "1 95.93% ± 0.48% +0.64 [-1.09, +2.37] 4.00 0.50",
        "ensemble of all 99.00%",
        "ensemble of 11 seeds 95.93% ± 1.00% -10.64 [-12.09, -9.37]",
    ]
    assert lines(chosen_table(summary, "accuracy")) == [
        "chosen val acc test acc NLL ECE agreement McNemar seconds",
        "0 90.00% 81.25% 0.5000 0.0100 3.0",
        "1 90.00% 81.25% 0.5000 0.0100 75.00% 0.62 3.0",
        "ensemble 90.00% 99.00% 0.5000 0.0100",
    ]


def test_a_difference_is_no_gain_where_less_is_better() -> None:
    confirmations = tuple(confirmation(k, metric="test_nll") for k in (0, 1))
    summary = GenerationsSummary(generations=(FIRST, RESULT), confirmations=confirmations)
    head = lines(summary_table(summary, "nll"))[0]
    assert head == "generation test NLL, 3 seeds vs gen. 0, nats T alpha"


def test_without_fresh_seeds_it_is_of_the_chosen_models_and_has_no_gain() -> None:
    summary = GenerationsSummary(generations=(FIRST, RESULT), ensemble=ENSEMBLE)
    assert lines(summary_table(summary, "accuracy")) == [
        "generation test acc T alpha",
        "0 81.25%",
        "1 81.25% 4.00 0.50",
        "ensemble of all 99.00%",
    ]


def test_a_metric_that_is_no_accuracy_is_shown_as_it_is() -> None:
    loss = replace(
        confirmation(1, metric="loss"),
        mean=Interval(4.5, 4.25, 4.75),
        first=Interval(-0.5, -1.25, 0.25),
    )
    summary = GenerationsSummary(
        generations=(replace(RESULT, metrics={"loss": 9.0}),), confirmations=(loss,)
    )
    assert lines(summary_table(summary, "loss")) == [
        "generation loss, 3 seeds gain T alpha",
        "1 4.5 ± 0.25 -0.5 [-1.25, +0.25] 4.00 0.50",
    ]


def test_the_metrics_of_a_users_own_training_function_are_columns() -> None:
    first = replace(FIRST, metrics={"f1": 0.5})
    last = replace(RESULT, metrics={"loss": 12.34567, "f1": 0.75})
    assert lines(own_metrics_table([first, last], "f1")) == [
        "generation T alpha f1 loss seconds",
        "0 0.5 3.0",
        "1 4.00 0.50 0.75 12.35 3.0",
    ]


def test_columns_are_picked_in_the_order_that_is_given() -> None:
    table = Table(("a", "b", "c"), (("1", "2", "3"),), note="n")
    assert pick(table, "c", "x", "a") == Table(("c", "a"), (("3", "1"),), note="n")


def test_metrics_of_text_are_columns_and_those_that_none_has_are_not() -> None:
    own = {"val_nll": 4.5, "test_nll": 4.25, "test_perplexity": 70.11, "test_own_nll": 4.0}
    more = {"agreement": 0.75, "test_kl": 0.125, "test_draft_acceptance": 0.8125}
    summary = GenerationsSummary(
        generations=(
            replace(FIRST, metrics={**own, "test_unended": 0.0}),
            replace(RESULT, metrics={**own, **more, "test_unended": 0.5}),
        ),
        ensemble=replace(ENSEMBLE, metrics={"val_nll": 4.5, "test_nll": 4.0}),
    )
    further = ("perplexity", "agreement", "kl", "own_nll", "draft_acceptance", "distinct_2")
    table = chosen_table(summary, "nll", (*further, "unended"))
    assert lines(table, 120) == [
        "chosen val NLL test NLL perplexity agreement KL own NLL drafts kept no end seconds",
        "0 4.500 4.250 70.11 4.0000 3.0",
        "1 4.500 4.250 70.11 75.00% 0.1250 4.0000 81.25% 50.00% 3.0",
        "ensemble 4.500 4.000",
    ]
