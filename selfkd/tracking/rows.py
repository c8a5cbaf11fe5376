"""What is shown in W&B of the ledger's rows: plain values under names that sort and filter well."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from selfkd.results import Row

HIDDEN = ("history", "models", "predictions", "point", "hash")
OF_TRIAL = ("status", "error", "val_accuracy", "val_nll", "train_seconds")
ENDS = ("value", "low", "high")


def epoch_row(row: Row) -> Row:
    """Return what is drawn of an epoch."""
    return {name: value for name, value in row.items() if name not in HIDDEN}


def trial_summary(trial: Row) -> Row:
    """Return what is known of a trial at its end.

    >>> trial_summary({"status": "completed", "error": None, "val_accuracy": 0.5})
    {'status': 'completed', 'val_accuracy': 0.5, 'trial_val_accuracy': 0.5}
    """
    found = {name: trial[name] for name in OF_TRIAL if trial.get(name) is not None}
    if "val_accuracy" in found:  # a lineage has a val_accuracy, too
        found["trial_val_accuracy"] = found["val_accuracy"]
    return found


def trial_rank(trial: Row, *, metric: str, mode: str) -> tuple[float, float, int]:
    """Return what orders trials, best first: the metric, ties by NLL."""
    value = trial.get(metric) or 0.0
    return -value if mode == "max" else value, trial.get("val_nll", 0.0), trial["trial"]


def generation_row(result: Row) -> Row:
    """Return what is drawn of a generation, its calibration on the test split included.

    >>> generation_row({"generation": 1, "test_nll": 0.5, "diagnostics": {"test": {"brier": 0.1}}})
    {'generation': 1, 'test_nll': 0.5, 'brier': 0.1}
    """
    known = (result.get("diagnostics") or {}).get("test") or {}
    scaled = {f"scaled_{name}": value for name, value in (known.get("scaled") or {}).items()}
    row = result | {name: known.get(name) for name in ("brier", "kl")} | scaled
    return {
        name: value
        for name, value in row.items()
        if name not in HIDDEN and value is not None and not isinstance(value, list | dict)
    }


def best_and_last(results: Sequence[Row], *, metric: str, mode: str) -> Row:
    """Return what a table of runs is sorted by; the best generation is that on validation."""
    sign = 1 if mode == "max" else -1
    best = max(results, key=lambda result: sign * (result.get(metric) or 0.0))
    found: Row = {"generations": len(results), "best_generation": best["generation"]}
    for name in dict.fromkeys([metric, "val_accuracy", "test_accuracy"]):
        rows = {f"best_{name}": best, f"last_{name}": results[-1]}
        found |= {key: row[name] for key, row in rows.items() if row.get(name) is not None}
    return found


def intervals(named: Mapping[str, Row | None]) -> Row:
    """Return the ends of intervals under names of their own.

    >>> intervals({"gain": {"value": 0.2, "low": 0.1, "high": 0.3}, "share": None})
    {'gain': 0.2, 'gain_low': 0.1, 'gain_high': 0.3}
    """
    return {
        name if end == "value" else f"{name}_{end}": interval[end]
        for name, interval in named.items()
        for end in ENDS
        if interval is not None and interval.get(end) is not None
    }


def confirmation_summary(confirmation: Row) -> Row:
    """Return what a confirmation says of a generation: `gain` is over generation 0."""
    named = {"confirmed": "mean", "gain": "first", "step_gain": "previous"}
    found = {"confirmed_generation": confirmation.get("generation")}
    found |= intervals({name: confirmation.get(key) for name, key in named.items()})
    found["verdict"] = confirmation.get("verdict")
    return {name: value for name, value in found.items() if value is not None}
