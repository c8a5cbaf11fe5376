"""Run folders made by hand, with all that a run may hold; nothing is trained."""

from __future__ import annotations

import math
import random
from pathlib import Path
from typing import Any

from selfkd.config import dump_config, load_config
from selfkd.storage.files import save_json, save_text

Row = dict[str, Any]
DATA: Row = {
    "images": {"train": 200, "val": 400, "test": 1197},
    "classes": 10,
    "views": 1,
    "parameters": {"0": 24058, "1": 24058},
    "fingerprint": "ed6c50d478e09326",
    "val": "1a2afd616a158164",
    "test": "ea5531caf4546d4c",
}
ENVIRONMENT: Row = {
    "started": "2026-11-24T12:00:00+00:00",
    "python": "3.13.1",
    "cpu": "A CPU",
    "cpus": 2,
    "gpus": [],
    "versions": {"selfkd": "0.1.0", "torch": "2.14.1", "ray": "2.60.0"},
}


def generations_run(
    path: Path,
    *,
    rounds: int = 2,
    done: int | None = None,
    trials: int = 6,
    seed: int = 0,
    seeds: int = 3,
    data: Row | None = None,
    lift: float = 0.004,
    diagnostics: bool = True,
    settings: tuple[str, ...] = (),
) -> Path:
    """Make the folder of a run of generations.

    Args:
        path: of the folder.
        rounds: after generation 0.
        done: generations that are finished; all when not given.
        trials: of each generation.
        seed: of the run.
        seeds: of the confirmation; none at 0, as in older runs.
        data: facts of the data.
        lift: of accuracy, a generation.
        diagnostics: whether results have them; older runs have none.
        settings: of the config.
    """
    rolled = random.Random(f"{seed} {lift} {trials}")
    done = rounds + 1 if done is None else done
    texts = (f"search.trials={trials}", f"confirm.seeds={seeds}", *settings)
    config = load_config(settings=texts, flags={"rounds": rounds, "seed": seed})
    _begin(path, "generations", dump_config(config), data or DATA)
    rows: list[Row] = []
    baseline: list[float] = []
    for number in range(done):
        folder = path / f"generation_{number:03d}"
        tried = [_trial(folder, number, k, rolled, lift) for k in range(trials)]
        best = max(tried, key=lambda row: row["val_accuracy"])
        test = best["val_accuracy"] - 0.015
        result = _result(number, best, test, rows, trials)
        if diagnostics:
            found = _diagnostics(test, number, rolled, (data or DATA)["classes"])
            result["diagnostics"] = {"val": found, "test": found}
        save_json(folder / "result.json", result)
        row = {k: v for k, v in result.items() if k not in ("history", "models", "teachers")}
        if seeds:
            accuracy = [test - 0.003 * rolled.random() for _ in range(seeds)]
            baseline = baseline or accuracy
            row["confirmation"] = _confirmation(number, accuracy, baseline, seed)
            save_json(folder / "confirmation.json", row["confirmation"])
        rows.append(row)
    if done <= rounds:
        folder = path / f"generation_{done:03d}"
        _trial(folder, done, 0, rolled, lift)
        _trial(folder, done, 1, rolled, lift, failed="RuntimeError: out of memory")
    else:
        save_json(
            path / "summary.json",
            {"generations": rows, "ensemble": _measured("ensemble", 0.972), "controls": []},
        )
    return path


def ensemble_run(path: Path, *, done: bool = True, seed: int = 0) -> Path:
    """Make the folder of a run of an ensemble of three and its student."""
    rolled = random.Random(seed)
    config = load_config(settings=("search.trials=4", "members.count=3"), flags={"seed": seed})
    _begin(path, "ensemble", dump_config(config), DATA)
    members = [_trial(path / "members", 0, k, rolled, 0) for k in range(3)]
    model = {"name": "selfkd_cnn", "args": {"width": 16}}
    save_json(
        path / "members" / "result.json", {"members": [{**row, "model": model} for row in members]}
    )
    tried = [_trial(path / "student", 1, k, rolled, 0.01) for k in range(4)]
    if not done:
        return path
    best = max(tried, key=lambda row: row["val_accuracy"])
    labels, taught = [0.945, 0.951, 0.948], [0.957, 0.96, 0.962]
    rows = [
        {**_measured("single member, mean of 3", 0.955), "low": 0.949, "high": 0.961},
        _measured("best member on validation", 0.953),
        {**_measured("ensemble of 3, probabilities", 0.964), "parameters": 72174},
        {**_measured("student, labels only", 0.948), "low": 0.94, "high": 0.956, "runs": labels},
        {**_measured("student, from its teacher", 0.96), "low": 0.95, "high": 0.97, "runs": taught},
    ]
    chosen = {
        "point": best["point"],
        "temperature": best["point"]["distill.temperature"],
        "alpha": best["point"]["distill.alpha"],
        "average": "probabilities",
        "val_accuracy": best["val_accuracy"],
        "hash": best["hash"],
    }
    summary = {
        "rows": rows,
        "teacher": {"source": "members", "members": 3, **_measured("", 0.964)},
        "chosen": chosen,
        "trials": 4,
        "seeds": 3,
        "gain": {"value": 0.0117, "low": 0.004, "high": 0.0194},
        "share": {"value": 0.72, "low": 0.31, "high": 4.2},
    }
    of_labels, of_student = (_diagnostics(0.95, number, rolled, 10) for number in (0, 1))
    summary["diagnostics"] = {
        "labels": {"val": of_labels, "test": of_labels},
        "student": {"val": of_student, "test": of_student},
    }
    save_json(path / "summary.json", summary)
    return path


def capacity_run(path: Path) -> Path:
    """Make the folder of a capacity curve of three sizes."""
    _begin(
        path, "capacity", dump_config(load_config(settings=("capacity.values=[2, 8, 32]",))), DATA
    )
    sizes = []
    for place, value in enumerate((2, 8, 32)):
        labels, taught = 0.80 + 0.05 * place, 0.83 + 0.05 * place
        sizes.append(
            {
                "value": value,
                "parameters": 100 * 4**place,
                "labels": {**_ends(labels, 0.01), "runs": [labels - 0.004, labels + 0.004]},
                "taught": {**_ends(taught, 0.01), "runs": [taught - 0.004, taught + 0.004]},
                "difference": _ends(0.03, 0.02),
                "p_holm": 0.01 if place else None,
                "verdict": "helps" if place else "unknown",
            }
        )
    summary = {
        "key": "model.args.width",
        "seeds": 2,
        "teacher": {**_measured("", 0.964), "parameters": 120_000},
        "sizes": sizes,
        "verdict": "distillation helps from 400 to 1.6 k parameters; no evidence outside",
        "said": ["on average over the 3 sizes: +3.00 % [+1.00, +5.00], it helps"],
    }
    save_json(path / "summary.json", summary)
    return path


def study_run(path: Path) -> Path:
    """Make the folder of a study of two arms with teachers from elsewhere."""
    settings = ("study={arms: {labels: {}, taught: {teacher: labels}}}", "confirm.seeds=2")
    _begin(path, "study", dump_config(load_config(settings=settings)), DATA)
    arms = [
        {
            "name": name,
            "runs": [{"test_accuracy": mean - 0.003}, {"test_accuracy": mean + 0.003}],
            "mean": _ends(mean, 0.02),
            "errors": _ends((1 - mean) * 1197, 5.0),
            **({"agreement": _ends(0.97, 0.01)} if name == "taught" else {}),
        }
        for name, mean in (("labels", 0.93), ("taught", 0.95))
    ]
    verdict = "taught is better than labels: +2.00 % [+1.00, +3.00], 2 paired seeds"
    summary = {
        "arms": arms,
        "contrasts": [{"arm": "taught", "to": "labels", "verdict": verdict}],
        "members": {"count": 1, "test_accuracy": 0.97, "errors": 36},
    }
    save_json(path / "summary.json", summary)
    return path


def _ends(value: float, half: float) -> Row:
    return {"value": value, "low": value - half, "high": value + half}


def _begin(path: Path, command: str, config: str, data: Row) -> None:
    path.mkdir(parents=True)
    save_text(path / "command", command)
    save_text(path / "config.yaml", config)
    save_text(path / "run_id", f"{path.name}-0000")
    save_json(path / "data.json", data)
    save_json(path / "environment.json", [ENVIRONMENT])


def _trial(
    folder: Path,
    generation: int,
    number: int,
    rolled: random.Random,
    lift: float,
    *,
    failed: str | None = None,
) -> Row:
    top = 0.965 + lift * generation + 0.012 * rolled.random()
    history = [
        {
            "epoch": epoch,
            "loss": 2.3 * math.exp(-epoch / 3),
            "hard_loss": 2.2 * math.exp(-epoch / 3),
            "soft_loss": 2.5 * math.exp(-epoch / 3),
            "val_accuracy": top * (1 - math.exp(-epoch / 2.0)),
            "val_nll": 0.1 + 2 * math.exp(-epoch / 3),
            "seconds": 0.1 * epoch,
        }
        for epoch in range(1, 11)
    ]
    history[-1]["val_accuracy"] = top
    point = {
        "distill.temperature": 20 ** rolled.random(),
        "distill.alpha": rolled.random(),
    }
    row: Row = {
        "stage": f"generation-{generation}",
        "trial": number,
        "seed": number,
        "point": point if generation else {},
        "teachers": [],
        "status": "failed" if failed else "completed",
        "error": failed,
        "train_seconds": 1.0,
        "history": [] if failed else history,
    }
    if not failed:
        row |= {
            "hash": f"{rolled.getrandbits(64):016x}",
            "val_accuracy": top,
            "val_nll": history[-1]["val_nll"],
        }
    save_json(folder / f"trial_{number:03d}" / "result.json", row)
    return row


def _result(number: int, best: Row, test: float, before: list[Row], trials: int) -> Row:
    teachers = [{"hash": before[-1]["hash"]}] if before else []
    return {
        "generation": number,
        "trial": best["trial"],
        "point": best["point"],
        "temperature": best["point"].get("distill.temperature"),
        "alpha": best["point"].get("distill.alpha"),
        "val_accuracy": best["val_accuracy"],
        "val_nll": best["val_nll"],
        "hash": best["hash"],
        "teachers": teachers,
        "models": [{"hash": best["hash"]}],
        "wanted_models": 1,
        "history": best["history"],
        "parameters": 24058,
        "test_accuracy": test,
        "test_nll": 0.16 - 0.01 * number,
        "test_ece": 0.03 - 0.002 * number,
        **({"agreement": 0.95 + 0.005 * number} if number else {}),
        "predictions": "x",
        "trials": trials,
        "failed": 0,
        "train_seconds": 8.0,
        "seconds": 5.0,
    }


def _diagnostics(test: float, number: int, rolled: random.Random, classes: int) -> Row:
    bins = []
    for place in range(15):
        low, high = place / 15, (place + 1) / 15
        count = int(900 * (place / 14) ** 8)
        confidence = (low + high) / 2 if count else None
        right = None if confidence is None else max(0.0, confidence - 0.05 + 0.02 * number)
        bins.append(
            {"low": low, "high": high, "count": count, "confidence": confidence, "accuracy": right}
        )
    confusions = [
        {"label": label, "predicted": (label * 3 + 1) % classes, "count": 9 - label}
        for label in range(6)
    ]
    return {
        "accuracy": test,
        "nll": 0.16,
        "brier": 0.05,
        "ece": 0.03,
        "scaled": {"temperature": 1.2, "nll": 0.15, "brier": 0.049, "ece": 0.012},
        "reliability": bins,
        "class_accuracy": [0.9 + 0.1 * rolled.random() for _ in range(classes - 1)] + [None],
        "confusions": confusions,
        "agreement": 0.95 if number else None,
        "kl": 0.04 if number else None,
        "teacher_confusions": confusions[1:] if number else [],
    }


def _confirmation(number: int, accuracy: list[float], baseline: list[float], seed: int) -> Row:
    mean = sum(accuracy) / len(accuracy)
    gain = mean - sum(baseline) / len(baseline)
    against = {"value": gain, "low": gain - 0.004, "high": gain + 0.004}
    single = len(accuracy) == 1
    ends = {"low": None, "high": None} if single else {"low": mean - 0.004, "high": mean + 0.004}
    verdict = "better than" if gain > 0.004 else "no evidence of a difference to"
    return {
        "seeds": [1000 * seed + k for k in range(len(accuracy))],
        "test_accuracy": accuracy,
        "mean": {"value": mean, **ends},
        "first": against if number else None,
        "previous": against if number else None,
        "mcnemar": {"only_student": 12, "only_teacher": 7, "p": 0.359} if number else None,
        "verdict": f"generation {number}: {verdict} generation 0" if number else None,
    }


def _measured(name: str, accuracy: float) -> Row:
    return {
        "name": name,
        "val_accuracy": accuracy + 0.01,
        "val_nll": 0.1,
        "test_accuracy": accuracy,
        "test_nll": 0.15,
        "test_ece": 0.03,
        "parameters": 24058,
        "ms_1": 0.4,
        "ms_128": 0.02,
    }
