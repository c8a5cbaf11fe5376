"""The born-again loop, and the run folder that remembers what is done.

Generation 0 learns from labels; generation k from a teacher made of the generations before
(Furlanello et al., Born-Again Neural Networks, 2018, https://arxiv.org/abs/1805.04770).
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from selfkd.config import (
    Config,
    ConfigError,
    differences,
    dump_config,
    from_tree,
    parse_yaml,
    to_tree,
)
from selfkd.files import load_json, save_json, save_text
from selfkd.jobs import Executor, Job, Outcome, Row, run_one
from selfkd.space import Optuna, Point, Points, Proposer, make_points

RESUMABLE = ("rounds", "tracking.", "resources.", "storage", "name", "data.root", "data.download")


class RunError(RuntimeError):
    """A run cannot go on: says why, and what to do."""


class Listener(Protocol):
    """Whoever wants to follow a run: a terminal, a tracker."""

    def labelling(self, generation: int, teachers: int) -> None:
        """The teachers of a generation are asked for their soft targets."""

    def generation_started(self, generation: int, trials: int, done: int) -> None:
        """A generation of so many trials begins, some of them done before a resume."""

    def trial_reported(self, trial: Row, rows: Sequence[Row]) -> None:
        """A running trial has new epochs."""

    def trial_finished(self, trial: Row) -> None:
        """A trial has its result: completed, stopped or failed."""

    def generation_finished(self, result: Row) -> None:
        """A generation has been chosen and measured; also told of those done before a resume."""


class RunFolder:
    """The ledger of a run: what is in it is done."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()

    @classmethod
    def create(cls, path: Path, config: Config) -> RunFolder:
        """Start a new run folder.

        Raises:
            ConfigError: it exists already, or cannot be written.
        """
        if path.exists():
            raise ConfigError(
                f"run folder {path} exists already: continue it with --resume {path}, "
                "or choose another --name"
            )
        try:
            path.mkdir(parents=True)
            save_text(path / "run_id", f"{path.name}-{secrets.token_hex(4)}")
            save_text(path / "config.yaml", dump_config(config))
        except OSError as error:
            raise ConfigError(f"run folder {path} must be writable: {error.strerror}") from None
        return cls(path)

    @classmethod
    def open(cls, path: Path) -> tuple[RunFolder, Config]:
        """Open a run folder to continue it.

        Raises:
            ConfigError: it is no run folder.
        """
        config = path / "config.yaml"
        if not config.is_file():
            raise ConfigError(f"--resume must be a run folder (with a config.yaml), got {path}")
        return cls(path), from_tree(parse_yaml(config.read_text(), str(config)))

    def check_change(self, old: Config, new: Config) -> None:
        """Check that a changed config is no other experiment.

        Raises:
            ConfigError: with what differs.
        """
        refused = [line for line in differences(old, new) if not line.startswith(RESUMABLE)]
        if refused:
            raise ConfigError(
                f"{self.path} was started with another config, so it cannot be resumed with this "
                "one; start a new run, or leave out:\n  " + "\n  ".join(refused)
            )
        done = len(self.results())
        if new.rounds + 1 < done:
            raise ConfigError(f"rounds must be at least the {done - 1} done, got {new.rounds}")

    def keep(self, config: Config, data: Row) -> None:
        """Write down the config of this start and the facts of the data.

        Raises:
            ConfigError: the run was started on other data.
        """
        path = self.path / "data.json"
        known = load_json(path) if path.exists() else data
        changed = [f"{key}: {known[key]} -> {data[key]}" for key in data if known[key] != data[key]]
        if changed:
            raise ConfigError(
                f"{self.path} was started on other data, so it cannot be resumed on this:\n  "
                + "\n  ".join(changed)
            )
        save_json(path, data)
        save_text(self.path / "config.yaml", dump_config(config))

    @property
    def run_id(self) -> str:
        """The name of this run among all runs of that name, made when it began."""
        return (self.path / "run_id").read_text()

    @property
    def targets(self) -> Path:
        """Where the soft targets lie."""
        return self.path / "targets"

    def generation(self, generation: int) -> Path:
        """Return the folder of a generation."""
        return self.path / f"generation_{generation:03d}"

    def trial(self, generation: int, number: int) -> Path:
        """Return the folder of a trial."""
        return self.generation(generation) / f"trial_{number:03d}"

    def results(self) -> list[Row]:
        """Return the results of the finished generations, in order."""
        results: list[Row] = []
        while (path := self.generation(len(results)) / "result.json").exists():
            results.append(load_json(path))
        return results

    def trial_result(self, generation: int, number: int) -> Row | None:
        """Return the result of a finished trial."""
        path = self.trial(generation, number) / "result.json"
        result: Row | None = load_json(path) if path.exists() else None
        return result

    def relative(self, path: Path) -> str:
        """Return a path as the ledger keeps it, so that a run folder can be moved."""
        return str(path.relative_to(self.path))


def trial_seed(seed: int, generation: int, number: int) -> int:
    """Return the seed of a trial: its own, and the same in every run of the same config."""
    digest = hashlib.sha256(f"{seed}/{generation}/{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big")


class _Trials:
    """The jobs of one generation: asks the proposer, writes each result into the ledger."""

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        generation: int,
        teachers: Sequence[Row],
        proposer: Proposer,
        listener: Listener,
    ) -> None:
        self.config, self.folder, self.generation = config, folder, generation
        self.teachers, self.proposer, self.listener = teachers, proposer, listener
        self.results: dict[int, Row] = {}
        self._open: dict[int, tuple[Row, list[Row]]] = {}
        for number in range(config.search.trials):
            result = folder.trial_result(generation, number)
            if result is not None and result["status"] != "failed":
                self.results[number] = result
                proposer.tell(number, result["point"], result.get("val_accuracy"))
        self._waiting = [n for n in range(config.search.trials) if n not in self.results]

    def ask(self) -> Job | None:
        if not self._waiting:
            return None
        number = self._waiting.pop(0)
        point = self.proposer.ask(number)
        seed = trial_seed(self.config.seed, self.generation, number)
        trial = {
            "generation": self.generation,
            "trial": number,
            "seed": seed,
            "point": point,
            "teachers": [teacher["hash"] for teacher in self.teachers],
        }
        self._open[number] = (trial, [])
        payload = {
            "config": to_tree(self.config.at(point)),
            "generation": self.generation,
            "seed": seed,
            "teachers": _located(self.folder, self.teachers),
            "targets": str(self.folder.targets),
            "student": str(self.folder.trial(self.generation, number) / "student.safetensors"),
        }
        return Job("train", payload)

    def _number(self, job: Job) -> int:
        return int(Path(job.payload["student"]).parent.name.removeprefix("trial_"))

    def report(self, job: Job, rows: Sequence[Row]) -> None:
        trial, history = self._open[self._number(job)]
        # a trial whose worker died begins again
        history[:] = [row for row in history if row["epoch"] < rows[0]["epoch"]] + list(rows)
        self.listener.trial_reported(trial, rows)

    def tell(self, outcome: Outcome) -> None:
        number = self._number(outcome.job)
        trial, history = self._open.pop(number)
        last: Row = history[-1] if history else {}
        measured: Row = {
            key: last[key] for key in ("val_accuracy", "val_nll", "hash") if key in last
        }
        status = "stopped" if outcome.stopped else "failed" if outcome.error else "completed"
        result = {
            **trial,
            "status": status,
            "error": outcome.error,
            **measured,
            "train_seconds": last.get("seconds", 0.0),
            "history": history,
        }
        save_json(self.folder.trial(self.generation, number) / "result.json", result)
        self.results[number] = result
        self.proposer.tell(number, trial["point"], last.get("val_accuracy"))
        self.listener.trial_finished(result)


def born_again(
    config: Config, folder: RunFolder, executor: Executor, listener: Listener
) -> list[Row]:
    """Train generation 0 and `config.rounds` born-again generations; finished ones are kept.

    Args:
        config: of the run.
        folder: what is done, and where the rest goes.
        executor: runs the trials.
        listener: is told of everything.

    Returns:
        The result of each generation.

    Raises:
        ConfigError: the data or the models are not as the config says.
        RunError: all trials of a generation failed.
    """
    results = folder.results()[: config.rounds + 1]
    if len(results) <= config.rounds:
        checked = run_one(executor, "check", config=to_tree(config))
        if "fault" in checked:
            raise ConfigError(checked["fault"])
        folder.keep(config, checked["facts"])
    for result in results:
        listener.generation_finished(result)
    for generation in range(len(results), config.rounds + 1):
        result = _generation(config, folder, executor, listener, generation, results)
        results.append(result)
        listener.generation_finished(result)
    return results


def measure_ensemble(
    config: Config, folder: RunFolder, executor: Executor, results: Sequence[Row]
) -> Row:
    """Measure the ensemble of all generations, the average of their probabilities."""
    members = [
        {"hash": result["hash"], "predictions": str(folder.path / result["predictions"])}
        for result in results
    ]
    row = run_one(executor, "ensemble", config=to_tree(config), members=members)
    save_json(folder.path / "summary.json", _summary(results, row))
    return row


def finished(config: Config, folder: RunFolder) -> tuple[list[Row], Row] | None:
    """Return the results and the ensemble of a run that has nothing left to do, else None."""
    results = folder.results()
    path = folder.path / "summary.json"
    if len(results) <= config.rounds or not path.exists():
        return None
    summary = load_json(path)
    if [row["hash"] for row in summary["generations"]] != [row["hash"] for row in results]:
        return None
    return results, summary["ensemble"]


def _summary(results: Sequence[Row], ensemble: Row) -> Row:
    """Return what a program would want of a finished run."""
    hidden = ("history", "models", "teachers")
    rows = [{k: v for k, v in result.items() if k not in hidden} for result in results]
    return {"generations": rows, "ensemble": ensemble}


def _generation(
    config: Config,
    folder: RunFolder,
    executor: Executor,
    listener: Listener,
    generation: int,
    results: Sequence[Row],
) -> Row:
    start = time.perf_counter()
    teachers = _teachers(config, results)
    if teachers and not config.distill.live:
        listener.labelling(generation, len(teachers))
        for teacher in _located(folder, teachers):
            run_one(
                executor,
                "label",
                config=to_tree(config),
                student=teacher["checkpoint"],
                targets=str(folder.targets),
            )
    proposer = _proposer(config, generation, results)
    trials = _Trials(config, folder, generation, teachers, proposer, listener)
    listener.generation_started(generation, config.search.trials, len(trials.results))
    executor.run(
        trials,
        max_epochs=config.train.epochs if config.search.scheduler == "asha" else None,
        limit=proposer.limit,
    )
    ranked = _ranked(trials.results)
    if not ranked:
        raise RunError(_all_failed(generation, trials.results))
    result = _measure(config, folder, executor, generation, teachers, ranked)
    result |= {
        "trials": len(trials.results),
        "failed": sum(trial["status"] == "failed" for trial in trials.results.values()),
        "train_seconds": sum(trial["train_seconds"] for trial in trials.results.values()),
        "seconds": time.perf_counter() - start,
    }
    save_json(folder.generation(generation) / "result.json", result)
    _prune(folder, generation, trials.results, result)
    return result


def _teachers(config: Config, results: Sequence[Row]) -> list[Row]:
    """Return `hash` and `checkpoint` (within the run folder) of a generation's teachers."""
    if not results:
        return []
    if config.distill.teacher == "lineage":
        return [result["models"][0] for result in results]
    models: list[Row] = results[-1]["models"]
    return models


def _located(folder: RunFolder, teachers: Sequence[Row]) -> list[Row]:
    return [
        {**teacher, "checkpoint": str(folder.path / teacher["checkpoint"])} for teacher in teachers
    ]


def _proposer(config: Config, generation: int, results: Sequence[Row]) -> Proposer:
    space = config.space(generation)
    last: Point = results[-1]["point"] if results else {}
    winner = {key: last[key] for key in space if key in last}
    first = [winner] if space and winner.keys() == space.keys() else []
    seed = trial_seed(config.seed, generation, -1)
    if config.search.algorithm == "optuna":
        return Optuna(space, seed=seed, first=first)
    return Points(
        make_points(
            space,
            count=config.search.trials,
            algorithm=config.search.algorithm,
            seed=seed,
            first=first,
        )
    )


def _ranked(trials: dict[int, Row]) -> list[Row]:
    """Return the completed trials, best first: validation accuracy, ties by NLL."""
    completed = [trial for trial in trials.values() if trial["status"] == "completed"]
    return sorted(completed, key=lambda t: (-t["val_accuracy"], t["val_nll"], t["trial"]))


def _all_failed(generation: int, trials: dict[int, Row]) -> str:
    errors = [trials[number]["error"] for number in sorted(trials) if trials[number]["error"]]
    return f"all {len(trials)} trials of generation {generation} failed; the first: {errors[0]}"


def _measure(
    config: Config,
    folder: RunFolder,
    executor: Executor,
    generation: int,
    teachers: Sequence[Row],
    ranked: Sequence[Row],
) -> Row:
    chosen = ranked[0]
    best = folder.generation(generation) / "student.safetensors"
    predictions = folder.generation(generation) / "predictions.safetensors"
    source = folder.trial(generation, chosen["trial"]) / "student.safetensors"
    if source.exists():
        _link(source, best)
    measured = run_one(
        executor,
        "score",
        config=to_tree(config),
        student=str(best),
        predictions=str(predictions),
        teachers=_located(folder, teachers),
    )
    distill = config.at(chosen["point"]).distill
    kept = int(config.distill.teacher[4:]) if config.distill.teacher.startswith("top:") else 1
    models = [{"hash": chosen["hash"], "checkpoint": folder.relative(best)}] + [
        {
            "hash": trial["hash"],
            "checkpoint": folder.relative(
                folder.trial(generation, trial["trial"]) / "student.safetensors"
            ),
        }
        for trial in ranked[1:kept]
    ]
    return {
        "generation": generation,
        "trial": chosen["trial"],
        "point": chosen["point"],
        "temperature": distill.temperature if generation else None,
        "alpha": distill.alpha if generation else None,
        "val_accuracy": chosen["val_accuracy"],
        "val_nll": chosen["val_nll"],
        **measured,
        "teachers": list(teachers),
        "models": models,
        "wanted_models": kept,
        "predictions": folder.relative(predictions),
        "history": chosen["history"],
    }


def _link(source: Path, target: Path) -> None:
    """Let a file stand in a second place, whole or not at all, at no cost where links work."""
    beside = target.with_name(f".{target.name}.link")
    beside.unlink(missing_ok=True)
    try:
        os.link(source, beside)
    except OSError:
        shutil.copyfile(source, beside)
    os.replace(beside, target)


def _prune(folder: RunFolder, generation: int, trials: dict[int, Row], result: Row) -> None:
    """Remove the students that teach no one: the ledger keeps their results."""
    kept = {model["checkpoint"] for model in result["models"]}
    for number in trials:
        student = folder.trial(generation, number) / "student.safetensors"
        if folder.relative(student) not in kept:
            student.unlink(missing_ok=True)
