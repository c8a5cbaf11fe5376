"""Controls of equal cost: could something else than the teacher's knowledge have made the gain?

Each is searched in as many trials as a generation, beside generation 1, and confirmed on the same
seeds. The ensemble of seeds stands beside the ensemble of the generations.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from selfkd.analysis.verdicts import compare
from selfkd.config import Config, Control, to_tree
from selfkd.config.space import Distribution, Point
from selfkd.execution.jobs import Executor, Job, run_one
from selfkd.experiments.arms import (
    Arm,
    ArmsListener,
    confirm_seeds,
    difference,
    measure,
    remove_students,
    retrain,
)
from selfkd.experiments.confirm import labels_only
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.stages import (
    Plan,
    Stage,
    label,
    located,
    make_proposer,
    ranked,
    run_all,
    run_stage,
    trial_seed,
)
from selfkd.results import Row
from selfkd.storage.files import load_json, save_json
from selfkd.storage.remote import as_path

TITLES: dict[Control, str] = {
    "seeds": "ensemble of seeds",
    "label_smoothing": "label smoothing",
    "dkpp": "permuted knowledge",
    "cwtm": "confidence weights",
    "teacher_free": "teacher-free",
}
SMOOTHING = {"uniform": [0.0, 0.5]}
KNOWLEDGE = {"dkpp": "permuted", "cwtm": "confidence", "teacher_free": "virtual"}
TAUGHT: tuple[Control, ...] = ("dkpp", "cwtm")  # by the teacher of generation 1


def run_controls(
    config: Config,
    folder: RunFolder,
    executor: Executor,
    listener: ArmsListener,
    results: Sequence[Row],
    confirmations: Sequence[Row],
) -> list[Row]:
    """Train and measure the controls that are asked for and not done yet; return all their rows.

    Args:
        config: of the run.
        folder: what is done, and where the rest goes.
        executor: runs the trials.
        listener: is told of everything.
        results: of the generations.
        confirmations: of the generations.

    Raises:
        RunError: all trials of a stage failed.
    """
    wanted: list[Control] = list(dict.fromkeys(config.controls))
    waiting: list[Control] = [
        name for name in wanted if name != "seeds" and not _path(folder, name).exists()
    ]
    chosen: dict[Control, Row] = {}
    arms: list[Arm] = []
    for name in waiting:
        chosen[name], arm = _search(config, folder, executor, listener, name, results)
        arms.append(arm)
    if arms:
        trained = retrain(
            config, folder, executor, listener, arms, title="controls on the same fresh seeds"
        )
        measured = measure(config, executor, listener, trained)
        for name, arm, row in zip(waiting, arms, measured, strict=True):
            row = _row(config, folder, name, chosen[name], row, confirmations)
            save_json(_path(folder, name), row)
            remove_students(arm.folder)
            remove_students(arm.folder.parent)
    if "seeds" in wanted and not _has_as_many(_path(folder, "seeds"), len(results)):
        row = _seeds(config, folder, executor, listener, results)
        save_json(_path(folder, "seeds"), row)
        remove_students(_path(folder, "seeds").parent)
    return [load_json(_path(folder, name)) for name in wanted]


def _path(folder: RunFolder, name: str) -> Path:
    return folder.path / "controls" / name / "result.json"


def _has_as_many(path: Path, generations: int) -> bool:
    return path.exists() and bool(load_json(path)["wanted"] == generations)


def _search(
    config: Config,
    folder: RunFolder,
    executor: Executor,
    listener: ArmsListener,
    name: Control,
    results: Sequence[Row],
) -> tuple[Row, Arm]:
    """Return the best trial of a control, and how it is trained again."""
    teachers = located(folder, results[1]["teachers"]) if name in TAUGHT else []
    if teachers:  # they are there, unless somebody has removed them
        title = f"{TITLES[name]}: the answers of generation 0"
        label(config, folder, executor, listener, title=title, teachers=teachers)
    more = {"knowledge": KNOWLEDGE[name]} if name in KNOWLEDGE else {}

    def plan(number: int, point: Point) -> Plan:
        own = config.at(point)
        return Plan(
            config=own,
            model=own.student or own.model,
            seed=trial_seed(config.seed, f"control_{name}", number),
            teachers=teachers,
            more=more,
        )

    stage = Stage(
        name=f"control_{name}",
        title=f"control: {TITLES[name]}",
        folder=folder.path / "controls" / name,
        trials=config.search.trials,
        plan=plan,
        proposer=make_proposer(
            config, _space(config, name), seed=trial_seed(config.seed, f"control_{name}", -1)
        ),
        early_stopping=True,
        metric=config.search.metric,
        mode=config.search.mode,
    )
    best = ranked(run_stage(config, folder, executor, listener, stage), stage)[0]
    arm = Arm(
        name=f"control_{name}_confirm",
        folder=stage.folder / "confirm",
        plan=plan(best["trial"], best["point"]),
    )
    return best, arm


def _space(config: Config, name: Control) -> dict[str, Distribution]:
    if name == "label_smoothing":
        smoothing = Distribution.parse(SMOOTHING)
        return {"train.label_smoothing": smoothing, **config.space(taught=False)}
    return config.space(taught=name != "cwtm")  # whose loss has neither T nor alpha


def _row(
    config: Config,
    folder: RunFolder,
    name: Control,
    chosen: Row,
    measured: Row,
    confirmations: Sequence[Row],
) -> Row:
    title = TITLES[name]
    other, baseline = labels_only(config, folder, confirmations)
    of_born_again, pairs = difference(confirmations[1], measured)
    first, pairs_of_first = difference(measured, baseline)
    verdicts = []
    if of_born_again is not None:
        verdicts.append(compare("generation 1", title, of_born_again, pairs))
    if first is not None:
        verdicts.append(compare(title, other, first, pairs_of_first))
    return {
        "name": name,
        "title": title,
        **measured,
        "first": first,
        "born_again": of_born_again,
        "verdict": "; ".join(verdicts) or f"{title} shares no seed with another",
        "trials": config.search.trials,
        "point": chosen["point"],
        "val_accuracy": chosen.get("val_accuracy"),
    }


def _seeds(
    config: Config,
    folder: RunFolder,
    executor: Executor,
    listener: ArmsListener,
    results: Sequence[Row],
) -> Row:
    """Measure the ensemble of as many models on labels as there are generations."""
    own, count = config.at(results[0]["point"]), len(results)
    plan = Plan(config=own, model=own.student or own.model, seed=0)
    arm = Arm(name="control_seeds", folder=folder.path / "controls" / "seeds", plan=plan)
    (trials,) = retrain(
        config,
        folder,
        executor,
        listener,
        [arm],
        title=f"control: {count} seeds on labels",
        seeds=confirm_seeds(config, count),
    )
    members = [
        {
            "hash": trial["hash"],
            "predictions": str(as_path(trial["checkpoint"]).with_name("predictions.safetensors")),
        }
        for trial in trials
    ]
    settings = to_tree(config)
    jobs = [
        Job(
            "score",
            {
                "config": settings,
                "student": trial["checkpoint"],
                "predictions": member["predictions"],
            },
        )
        for trial, member in zip(trials, members, strict=True)
        if not as_path(member["predictions"]).exists()
    ]
    run_all(executor, listener, "testing the seeds", jobs)
    born_again = [
        {"hash": row["hash"], "predictions": str(folder.path / row["predictions"])}
        for row in results
    ]
    found = run_one(
        executor, "contrast", config=settings, ensembles=[members, born_again[:1], born_again]
    )
    accuracy, (_, first, last) = found["accuracy"][0], found["differences"]
    title = f"ensemble of {len(members)} seeds"
    images = f"{found['images']:,} test images"
    against = _negative(last)
    verdicts = [
        compare(f"the ensemble of {count} generations", f"the {title}", against, images),
        compare(f"the {title}", "generation 0", first, images),
    ]
    return {
        "name": "seeds",
        "title": title,
        "test_accuracy": [accuracy["value"]],
        "mean": accuracy,
        "first": first,
        "born_again": against,
        "verdict": "; ".join(verdicts),
        "members": len(members),
        "wanted": count,
    }


def _negative(interval: Row) -> Row:
    """Return the interval of the difference the other way round."""
    low, high = interval["low"], interval["high"]
    return {
        "value": -interval["value"],
        "low": None if high is None else -high,
        "high": None if low is None else -low,
    }
