"""Rows of a run as W&B logs them: plain values under names that sort and filter well."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Literal

from selfkd.analysis.deploy import flat_row
from selfkd.config import Config, to_tree
from selfkd.results import (
    TIE,
    Confirmation,
    DeploySummary,
    Epoch,
    GenerationResult,
    Interval,
    Row,
    Trial,
    TrialResult,
    find_main,
    find_metric,
    is_measured,
)

ENDS = ("value", "low", "high")
PLAIN = ("generation", "trial", "temperature", "alpha", "parameters", "wanted_models")
LONGEST_ID = 80
"""Characters of the beginning of an id; the name of a trial follows."""
COUNTS = ("trials", "failed", "train_seconds", "seconds")


def short_name(stage: str, trial: int) -> str:
    """Return the name that a trial is shown by.

    >>> short_name("generation-1", 7), short_name("confirm-1", 0)
    ('g1-t7', 'confirm-1-t0')
    """
    kind, _, generation = stage.partition("-")
    return f"{f'g{generation}' if kind == 'generation' else stage}-t{trial}"


def short_id(run_id: str) -> str:
    """Return the beginning of the ids of a run, which W&B takes up to 128 characters of.

    >>> short_id("a-0"), short_id("a" * 200 + "-0")[72:]
    ('a-0', 'aaaaaaaa-83e87775')
    """
    if len(run_id) <= LONGEST_ID:
        return run_id
    digest = hashlib.blake2b(run_id.encode(), digest_size=4).hexdigest()
    return f"{run_id[:LONGEST_ID]}-{digest}"


def epoch_row(epoch: Epoch) -> Row:
    """Return the logged values of an epoch."""
    return {"epoch": epoch.epoch, "seconds": epoch.seconds, **epoch.metrics}


def trial_config(config: Config, trial: Trial) -> Row:
    """Return the config of a trial, without what it does not use."""
    found: Row = to_tree(config.at(trial.point))
    soft = trial.teachers and found["distill"]["mode"] == "tokens"
    if not soft:  # what the trial does not set itself, it does not use
        for key in ("temperature", "alpha", "terms"):
            if f"distill.{key}" not in trial.point:
                del found["distill"][key]
    found |= {"trial": trial.trial, "teachers": list(trial.teachers), "trial_seed": trial.seed}
    generation = trial.stage.partition("-")[2]
    return found | ({"generation": int(generation)} if generation.isdigit() else {})


def trial_summary(trial: TrialResult) -> Row:
    """Return the summary of a trial at its end.

    >>> trial = TrialResult(
    ...     stage="a", trial=0, seed=1, status="completed", metrics={"val_accuracy": 0.5}
    ... )
    >>> trial_summary(trial)
    {'status': 'completed', 'train_seconds': 0.0, 'trial_val_accuracy': 0.5}
    """
    found: Row = {"status": trial.status, "error": trial.error}
    found |= {"train_seconds": trial.train_seconds}
    # what it ended with; a lineage has a val_accuracy, too
    found |= {f"trial_{name}": v for name, v in trial.metrics.items() if _is_validation(name)}
    return {name: value for name, value in found.items() if value is not None}


def _is_validation(name: str) -> bool:
    return name.startswith("val_") and is_measured(name)


def trial_rank(trial: TrialResult, *, metric: str, mode: str) -> tuple[float, float, int]:
    """Return a key that sorts trials, best first: by the metric, ties by NLL."""
    value = trial.metric(metric) or 0.0
    return -value if mode == "max" else value, trial.metrics.get(TIE, 0.0), trial.trial


def generation_row(result: GenerationResult) -> Row:
    """Return the logged values of a generation, its calibration on the test split included.

    >>> from selfkd.results import Diagnostics
    >>> diagnostics = {"test": Diagnostics(metrics={"brier": 0.1})}
    >>> result = GenerationResult(
    ...     generation=1, trial=2, metrics={"test_nll": 0.5}, diagnostics=diagnostics
    ... )
    >>> row = generation_row(result)
    >>> row["generation"], row["test_nll"], row["brier"], "hash" in row
    (1, 0.5, 0.1, False)
    """
    known = result.diagnostics.get("test")
    own = {name: getattr(result, name) for name in (*PLAIN, *COUNTS)}
    row: Row = result.metrics | {name: value for name, value in own.items() if value is not None}
    if known is not None:
        row |= {name: known.metric(name) for name in ("brier", "kl")}
        row |= {f"scaled_{name}": value for name, value in (known.scaled or {}).items()}
    return {name: value for name, value in row.items() if value is not None}


def best_and_last(results: Sequence[GenerationResult], best: GenerationResult, metric: str) -> Row:
    """Return values to sort a table of runs by, of the best generation and of the last.

    Args:
        results: Finished generations.
        best: The best of them, on validation.
        metric: Metric that is chosen by, `search.metric`.

    >>> first, last = (
    ...     GenerationResult(generation=k, trial=0, metrics={"val_nll": nll, "test_nll": nll + 0.5})
    ...     for k, nll in enumerate((4.0, 3.75))
    ... )
    >>> best_and_last([first, last], last, "val_nll")  # doctest: +NORMALIZE_WHITESPACE
    {'generations': 2, 'best_generation': 1, 'best_val_nll': 3.75, 'last_val_nll': 3.75,
     'best_test_nll': 4.25, 'last_test_nll': 4.25}
    """
    found: Row = {"generations": len(results), "best_generation": best.generation}
    main = find_main(best.metrics)
    for name in dict.fromkeys([metric, *(f"{split}_{main}" for split in ("val", "test"))]):
        values = {f"best_{name}": best.metric(name), f"last_{name}": results[-1].metric(name)}
        found |= {key: value for key, value in values.items() if value is not None}
    return found


def validation_summaries(metric: str, mode: Literal["max", "min"]) -> dict[str, str]:
    """Return which summary a metric has other than its last value: none of the test split.

    >>> validation_summaries("val_nll", "min")
    {'val_accuracy': 'max', 'val_nll': 'min'}
    """
    known = {f"val_{name}": str(find_metric(name).mode) for name in ("accuracy", "nll")}
    return known | {metric: mode}


def intervals(named: Mapping[str, Interval | None]) -> Row:
    """Return the ends of intervals under names of their own.

    >>> intervals({"gain": Interval(0.2, 0.1, 0.3), "share": None})
    {'gain': 0.2, 'gain_low': 0.1, 'gain_high': 0.3}
    """
    return {
        name if end == "value" else f"{name}_{end}": value
        for name, interval in named.items()
        if interval is not None
        for end in ENDS
        if (value := getattr(interval, end)) is not None
    }


def confirmation_row(confirmation: Confirmation) -> Row:
    """Return the logged values of a replicated generation, with the ends of their intervals.

    >>> row = Confirmation(
    ...     generation=1, seeds=(7, 8), metric="test_accuracy", values=(0.5, 0.7),
    ...     mean=Interval(0.6, 0.5, 0.7), first=Interval(0.1),
    ... )
    >>> confirmation_row(row)  # doctest: +NORMALIZE_WHITESPACE
    {'generation': 1, 'confirmed/test_accuracy': 0.6, 'confirmed/test_accuracy_low': 0.5,
     'confirmed/test_accuracy_high': 0.7, 'confirmed/gain': 0.1}
    """
    named = {
        f"confirmed/{confirmation.metric}": confirmation.mean,
        "confirmed/gain": confirmation.first,
        "confirmed/step_gain": confirmation.previous,
    }
    given = {"confirmed/seeds": 1} if confirmation.given else {}
    return {"generation": confirmation.generation, **intervals(named), **given}


def deploy_rows(summary: DeploySummary) -> list[Row]:
    """Return the table of a deployment, all rows with the same keys."""
    rows = [flat_row(row) for row in summary.rows]
    keys = dict.fromkeys(key for row in rows for key in row)
    known = [key for key in keys if any(row.get(key) is not None for row in rows)]
    return [{key: row.get(key) for key in known} for row in rows]


def deploy_summary(summary: DeploySummary) -> Row:
    """Return the numbers of a deployment to sort a table of runs by, each with its row's key.

    >>> from selfkd.results import DeployRow
    >>> row = DeployRow(key="int8", title="ONNX int8", bytes=9)
    >>> deploy_summary(
    ...     DeploySummary(model="a", title="b", metric="nll", rows=(row,), served="int8", drop=0.5)
    ... )
    {'served': 'int8', 'exceeded': False, 'drop': 0.5, 'int8/bytes': 9}
    """
    found: Row = {"served": summary.served, "exceeded": summary.exceeded, "drop": summary.drop}
    for row in summary.rows:
        plain = flat_row(row)
        found |= {f"{row.key}/{name}": plain[name] for name in plain if name != "name"}
    return {name: value for name, value in found.items() if value is not None}


def confirmation_summary(confirmation: Confirmation) -> Row:
    """Return the summary of the replicated best generation: `gain` is over generation 0."""
    named = {
        "confirmed": confirmation.mean,
        "gain": confirmation.first,
        "step_gain": confirmation.previous,
    }
    given = {"confirmed_seeds": 1} if confirmation.given else {}
    return {"confirmed_generation": confirmation.generation, **intervals(named), **given}
