"""Many teachers, one student: train members, average them, distil the average, believe the result.

Hinton, Vinyals, Dean, "Distilling the Knowledge in a Neural Network", 2015,
https://arxiv.org/abs/1503.02531
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from selfkd.analysis.statistics import Interval, mean_interval, ratio_interval
from selfkd.config import Config, ModelConfig, Source, to_tree
from selfkd.config.space import Distribution, Point, Points
from selfkd.errors import ConfigError
from selfkd.execution.jobs import Executor, Job, run_one
from selfkd.experiments.arms import Arm, pair, retrain
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.stages import (
    Listener,
    Plan,
    Stage,
    label,
    make_proposer,
    ranked,
    run_all,
    run_stage,
    trial_seed,
)
from selfkd.results import Row
from selfkd.storage.files import link, load_json, save_json
from selfkd.storage.remote import as_path

MEMBERS = "members/result"
BATCHES = (1, 128)  # of images whose answers are timed
SPECIALISTS_CLASSES = 20  # fewer are too few to make groups that are worth a network each
TITLES: dict[Source, str] = {
    "members": "ensemble",
    "snapshots": "snapshot ensemble",
    "soup": "mean of weights",
    "greedy_soup": "greedy mean of weights",
    "weighted": "ensemble, fitted weights",
    "specialists": "generalist and specialists",
}


class CompressionListener(Listener, Protocol):
    """Whoever wants to follow a compression as well as its stages."""

    def compressed(self, summary: Row) -> None:
        """All is done."""


def compress(
    config: Config, folder: RunFolder, executor: Executor, listener: CompressionListener
) -> Row:
    """Make one model of many; what is done is kept.

    Args:
        config: of the run.
        folder: what is done, and where the rest goes.
        executor: runs the trials.
        listener: is told of everything.

    Returns:
        The summary, which is saved as `summary.json`: `rows` of the table, `share` of the
        ensemble's gain that the student keeps, and what was `chosen`.

    Raises:
        ConfigError: the data, the models or the members are not as the config says.
        RunError: all trials of a stage failed.
    """
    return _Compression(config, folder, executor, listener).run()


def teach(
    config: Config, folder: RunFolder, executor: Executor, listener: CompressionListener
) -> Callable[[Config], list[Row]]:
    """Make the teachers of a run and let them answer the training images; what is done is kept.

    Returns:
        What gives a student's config its teachers: `hash`, `checkpoint`, perhaps `weight`.

    Raises:
        ConfigError: the data, the models or the members are not as the config says.
        RunError: all trials of a stage failed.
    """
    work = _Compression(config, folder, executor, listener)
    _, sources = work._teach()
    return partial(work._teachers, sources)


def measure_models(
    config: Config,
    folder: RunFolder,
    executor: Executor,
    listener: Listener,
    models: Sequence[tuple[Sequence[Row], str]],
    timed: Sequence[int],
) -> list[Row]:
    """Measure models, and averages of several, on validation and test; time some of them.

    Args:
        config: of the run.
        folder: where predictions go.
        executor: does the work.
        listener: is told of it.
        models: `hash` and `checkpoint` of those whose answers are averaged, and how.
        timed: positions in `models`.

    Returns:
        A row for each: `val_accuracy`, `test_accuracy`, `test_nll`, `test_ece`; of those that are
        timed `parameters` and milliseconds an image, `ms_1` and `ms_128`, too.
    """
    work = _Compression(config, folder, executor, listener)
    rows = work._measured(models)
    costs = work._costs([models[number][0] for number in timed])
    for number, cost in zip(timed, costs, strict=True):
        rows[number] |= cost
    return rows


def check_members(config: Config) -> None:
    """Check what can be known of members from elsewhere before anything starts.

    Raises:
        ConfigError: one is not there.
    """
    for run in config.members.runs:
        find_members(run)
    for file in config.members.checkpoints:
        for path in (file.path, file.classes):
            if path is not None and not Path(path).is_file():
                raise ConfigError(f"members.checkpoints must be files, got {path}")


def tell_members(config: Config) -> str:
    """Return who teaches, in words."""
    members = config.members
    count = members.trained()
    parts = [f"{count} member{'' if count == 1 else 's'} on labels"] if count else []
    parts += [f"those of {run}" for run in members.runs]
    parts += [f"{len(members.checkpoints)} from files"] if members.checkpoints else []
    return ", ".join(parts)


def find_members(run: str) -> list[Path]:
    """Return the checkpoints of an earlier run's models: its generations', or its members'.

    Raises:
        ConfigError: it has none.
    """
    folder, _ = RunFolder.open(as_path(run))
    rows = [result["models"][0] for result in folder.results()]
    made = folder.path / f"{MEMBERS}.json"
    if made.exists():
        rows = load_json(made)["members"]
    found = [folder.path / row["checkpoint"] for row in rows]
    if not found or not all(path.exists() for path in found):
        raise ConfigError(f"--from must be a run with a finished generation or members, got {run}")
    return found


@dataclass(frozen=True)
class _Compression:
    config: Config
    folder: RunFolder
    executor: Executor
    listener: Any  # a CompressionListener; a Listener where only measuring is asked for

    def run(self) -> Row:
        members, sources = self._teach()
        student = self._search("student", self._student_plan(sources), taught=True)
        labels = self._labels_only()
        pairs = self._confirm(student, labels, sources)
        summary = self._measure(members, sources, student, pairs)
        save_json(self.folder.path / "summary.json", summary)
        self.listener.compressed(summary)
        return summary

    def _teach(self) -> tuple[list[Row], dict[Source, list[Row]]]:
        """Return the members and what is made of them, which has answered the training images."""
        checked = self._ask("check")
        if "fault" in checked:
            raise ConfigError(checked["fault"])
        self.folder.keep(self.config, checked["facts"])
        adopted = self._adopted()
        self._check(len(adopted), checked["facts"]["classes"])
        members = self._once(MEMBERS, lambda: {"members": self._members(adopted)})["members"]
        sources = self._sources(members)
        if not self.config.distill.live:
            self._label(sources)
        return members, sources

    # --- the members ---

    def _adopted(self) -> list[Row]:
        """Take in the models that were trained elsewhere."""
        members = self.config.members
        jobs: list[Row] = []
        for number, source in enumerate(
            [path for run in members.runs for path in find_members(run)]
        ):
            save = self.folder.path / "members" / f"run_{number:03d}.safetensors"
            if not save.exists():
                link(source, save)
            jobs.append({"save": str(save)})
        for number, checkpoint in enumerate(members.checkpoints):
            save = self.folder.path / "members" / f"file_{number:03d}.safetensors"
            jobs.append({"save": str(save), "source": asdict(checkpoint)})
        if not jobs:
            return []
        rows = self._ask_all("taking in members", "adopt", jobs)
        faults = [row["fault"] for row in rows if "fault" in row]
        if faults:
            raise ConfigError("\n".join(faults))
        unseen = sum(not row["seen"] for row in rows)
        if unseen:
            self.listener.noted(
                f"{unseen} of the {len(rows)} members from elsewhere learnt from other images than "
                "this run's training images: where these were its validation or test images, "
                "the figures flatter them"
            )
        keys = ("hash", "model", *self._keys())
        return [
            {**{key: row[key] for key in keys}, "checkpoint": job["save"]}
            for row, job in zip(rows, jobs, strict=True)
        ]

    def _check(self, adopted: int, classes: int) -> None:
        members, epochs = self.config.members, self.config.train.epochs
        count = adopted + members.trained()
        most = max([members.use or 0, *self._choices("members.use")])
        cycles = self._cycles(count)
        wanted = self._wanted()
        if most > count:
            raise ConfigError(f"members.use must be at most {count}, the members, got {most}")
        if "snapshots" in wanted and cycles > epochs:
            raise ConfigError(
                f"members.cycles must be at most train.epochs ({epochs}), got {cycles}"
            )
        if "specialists" in wanted and classes < SPECIALISTS_CLASSES:
            raise ConfigError(
                f"members.source must not be specialists with fewer than {SPECIALISTS_CLASSES} "
                f"classes, got {classes}"
            )

    def _choices(self, key: str) -> Sequence[Any]:
        """Return the values that the search space has for a key; of a range its ends."""
        spec = self.config.search.space.get(key)
        return Distribution.parse(spec).values if spec else ()

    def _cycles(self, members: int) -> int:
        return self.config.members.cycles or max(2, members)

    def _wanted(self) -> list[Source]:
        searched = self._choices("members.source")
        return list(dict.fromkeys([*self.config.members.sources(), *searched]))

    def _members(self, adopted: Sequence[Row]) -> list[Row]:
        """Train the members; return all, the best on validation first."""
        config, trained = self.config, []
        count = config.members.trained()
        if count:
            models = config.members.models or [config.model]

            def plan(number: int, point: Point) -> Plan:
                model = number % len(models)
                same = {"start": {"seed": trial_seed(config.seed, "members/start", model)}}
                return Plan(
                    config=config,
                    model=models[model],
                    seed=trial_seed(config.seed, "members", number),
                    more=same if config.members.same_init else {},
                )

            stage = self._stage("members", count, plan, title="members on labels")
            for row in self._run(stage):
                model = models[row["trial"] % len(models)]
                trained.append(
                    {
                        "hash": row["hash"],
                        "model": {"name": model.name, "args": model.args},
                        **{key: row[key] for key in self._keys()},
                        "checkpoint": str(stage.trial(row["trial"]) / "student.safetensors"),
                    }
                )
            if len(trained) < count:
                self.listener.noted(f"only {len(trained)} of the {count} members could be trained")
        members = [*trained, *adopted]
        for row in members:
            row["checkpoint"] = self.folder.relative(as_path(row["checkpoint"]))
        sign = -1 if self.config.search.mode == "max" else 1
        return sorted(
            members, key=lambda row: (sign * row[self.config.search.metric], row["val_nll"])
        )

    def _keys(self) -> list[str]:
        """Return what is known of a member on validation, what it is chosen by among it."""
        return list(dict.fromkeys(["val_accuracy", "val_nll", self.config.search.metric]))

    # --- what teaches ---

    def _sources(self, members: Sequence[Row]) -> dict[Source, list[Row]]:
        """Return the teachers of each source: `hash`, `checkpoint`, perhaps `weight`."""
        located = [
            {"hash": row["hash"], "checkpoint": str(self.folder.path / row["checkpoint"])}
            for row in members
        ]
        make: dict[Source, Callable[[Sequence[Row]], Row]] = {
            "snapshots": self._snapshots,
            "soup": partial(self._soup, greedy=False),
            "greedy_soup": partial(self._soup, greedy=True),
            "weighted": self._weighted,
            "specialists": self._specialists,
        }
        sources: dict[Source, list[Row]] = {"members": located}
        for source in self._wanted():
            if source != "members":
                made = self._once(f"sources/{source}", partial(make[source], located))
                sources[source] = [
                    {**row, "checkpoint": str(self.folder.path / row["checkpoint"])}
                    for row in made["teachers"]
                ]
        return sources

    def _snapshots(self, members: Sequence[Row]) -> Row:
        config = self.config

        def plan(number: int, point: Point) -> Plan:
            seed = trial_seed(config.seed, "snapshots", number)
            more = {"cycles": self._cycles(len(members))}
            return Plan(config=config, model=config.model, seed=seed, more=more)

        stage = self._stage("snapshots", 1, plan, title="one run of snapshots")
        (row,) = self._run(stage)
        kept = [epoch for epoch in row["history"] if "checkpoint" in epoch]
        return {
            "teachers": [
                {
                    "hash": epoch["hash"],
                    "checkpoint": self.folder.relative(stage.trial(0) / epoch["checkpoint"]),
                }
                for epoch in kept
            ]
        }

    def _soup(self, members: Sequence[Row], *, greedy: bool) -> Row:
        save = self._source(f"{'greedy_' if greedy else ''}soup.safetensors")
        made = self._ask("soup", checkpoints=_checkpoints(members), save=str(save), greedy=greedy)
        row = {"hash": made["hash"], "checkpoint": self.folder.relative(save)}
        return {"teachers": [row], "taken": made["taken"]}

    def _weighted(self, members: Sequence[Row]) -> Row:
        weights = self._ask("weigh", checkpoints=_checkpoints(members))["weights"]
        return {
            "teachers": [
                {
                    "hash": row["hash"],
                    "checkpoint": self.folder.relative(as_path(row["checkpoint"])),
                    "weight": weight,
                }
                for row, weight in zip(members, weights, strict=True)
            ]
        }

    def _specialists(self, members: Sequence[Row]) -> Row:
        config, generalist = self.config, members[0]
        classes = load_json(self.folder.path / "data.json")["classes"]
        clusters = self._ask(
            "cluster",
            checkpoint=generalist["checkpoint"],
            clusters=config.members.clusters or max(2, classes // 10),
        )["classes"]
        model = load_json(self.folder.path / f"{MEMBERS}.json")["members"][0]["model"]

        def plan(number: int, point: Point) -> Plan:
            return Plan(
                config=config,
                model=ModelConfig.of_checkpoint(model),
                seed=trial_seed(config.seed, "specialists", number),
                more={
                    "specialist": clusters[number],
                    "start": {"checkpoint": generalist["checkpoint"]},
                },
            )

        stage = self._stage("specialists", len(clusters), plan, title="specialists")
        rows = sorted(self._run(stage), key=lambda row: int(row["trial"]))
        parts = [generalist["checkpoint"]] + [
            str(stage.trial(row["trial"]) / "student.safetensors") for row in rows
        ]
        hashes = [generalist["hash"], *(row["hash"] for row in rows)]
        mark = hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]
        save = self._source("specialists_parts.json")
        above = [f"../{self.folder.relative(as_path(part))}" for part in parts]
        save_json(save, {"hash": mark, "parts": above})
        row = {"hash": mark, "checkpoint": self.folder.relative(save)}
        return {"teachers": [row], "classes": clusters}

    def _source(self, name: str) -> Path:
        return self.folder.path / "sources" / name

    def _teachers(self, sources: dict[Source, list[Row]], config: Config) -> list[Row]:
        rows = sources[config.members.source]
        return rows[: config.members.use] if config.members.source == "members" else rows

    def _label(self, sources: dict[Source, list[Row]]) -> None:
        """Let all that may teach answer the training images."""
        may_teach = self._choices("members.source") or [self.config.members.source]
        rows: dict[str, Row] = {}
        for source in may_teach:
            teachers = sources[source]
            if source == "members" and not self._choices("members.use"):
                teachers = teachers[: self.config.members.use]
            rows |= {row["hash"]: row for row in teachers}
        label(
            self.config,
            self.folder,
            self.executor,
            self.listener,
            title="labelling by the teachers",
            teachers=list(rows.values()),
        )

    # --- the student ---

    def _student_plan(self, sources: dict[Source, list[Row]]) -> Callable[[int, Point], Plan]:
        def plan(number: int, point: Point) -> Plan:
            own = self.config.at(point)
            return Plan(
                config=own,
                model=own.student or own.model,
                seed=trial_seed(self.config.seed, "student", number),
                teachers=self._teachers(sources, own),
            )

        return plan

    def _labels_plan(self, number: int, point: Point) -> Plan:
        own = self.config.at(point)
        seed = trial_seed(self.config.seed, "labels", number)
        return Plan(config=own, model=own.student or own.model, seed=seed)

    def _search(self, name: str, plan: Callable[[int, Point], Plan], *, taught: bool) -> Row:
        """Return the best trial of a search."""
        stage = Stage(
            name=name,
            title="student from the teachers" if taught else "student from labels only",
            folder=self.folder.path / name,
            trials=self.config.search.trials,
            plan=plan,
            proposer=make_proposer(
                self.config,
                self.config.space(taught=taught),
                seed=trial_seed(self.config.seed, name, -1),
            ),
            early_stopping=True,
            metric=self.config.search.metric,
            mode=self.config.search.mode,
        )
        best = self._run(stage)[0]
        save = self.folder.path / f"{name}.safetensors"
        source = stage.trial(best["trial"]) / "student.safetensors"
        if source.exists():
            link(source, save)
        for number in range(stage.trials):  # the ledger keeps their results
            (stage.trial(number) / "student.safetensors").unlink(missing_ok=True)
        return {**best, "checkpoint": str(save)}

    def _labels_only(self) -> Row | None:
        """Search the baseline too where there is something to search, for as many trials."""
        if self.config.space(taught=False) or not self.config.confirm.seeds:
            return self._search("labels", self._labels_plan, taught=False)
        return None

    def _confirm(
        self, student: Row, labels: Row | None, sources: dict[Source, list[Row]]
    ) -> list[tuple[Row, Row]]:
        """Return pairs of a student from labels only and one from the teachers, a pair a seed."""
        seeds = self.config.confirm.seeds
        if not seeds:
            assert labels is not None  # noqa: S101 - see _labels_only
            return [(labels, student)]
        arms = []
        for name, point in (
            ("labels", labels["point"] if labels else {}),
            ("student", student["point"]),
        ):
            own = self.config.at(point)
            teachers = self._teachers(sources, own) if name == "student" else ()
            plan = Plan(config=own, model=own.student or own.model, seed=0, teachers=teachers)
            where = self.folder.path / "confirm" / name
            arms.append(Arm(name=f"confirm_{name}", folder=where, plan=plan))
        pairs = pair(*retrain(self.config, self.folder, self.executor, self.listener, arms))
        if not pairs:
            raise RuntimeError("no pair of the confirmation could be trained")
        return pairs

    # --- the table ---

    def _measure(
        self,
        members: Sequence[Row],
        sources: dict[Source, list[Row]],
        student: Row,
        pairs: Sequence[tuple[Row, Row]],
    ) -> Row:
        chosen = self.config.at(student["point"])
        teachers = self._teachers(sources, chosen)
        ensembles = dict(_ensembles(sources, self.config.distill.average))
        ensembles["the student's teacher"] = (teachers, chosen.distill.average)
        singles = [[row] for row in sources["members"]] + [[row] for pair in pairs for row in pair]
        asked = [(rows, average) for rows, average in ensembles.values()]
        asked += [(rows, "probabilities") for rows in singles]
        measured = self._measured(asked)
        of_ensembles = dict(zip(ensembles, measured, strict=False))
        rest = measured[len(ensembles) :]
        of_members = rest[: len(members)]
        of_pairs = list(zip(*[iter(rest[len(members) :])] * 2, strict=True))
        teacher = of_ensembles.pop("the student's teacher")
        rows = [
            _mean_row(f"single member, mean of {len(members)}", of_members),
            {"name": "best member on validation", **of_members[0]},
            *({"name": name, **row} for name, row in of_ensembles.items()),
            _mean_row("student, labels only", [labels for labels, _ in of_pairs]),
            _mean_row("student, from its teacher", [taught for _, taught in of_pairs]),
        ]
        costs = [[sources["members"][0]]] * 2 + [ensembles[name][0] for name in of_ensembles]
        costs += [[pairs[0][0]], [pairs[0][1]]]
        for row, cost in zip(rows, self._costs(costs), strict=True):
            row |= cost
        accuracy = [
            (labels["test_accuracy"], taught["test_accuracy"]) for labels, taught in of_pairs
        ]
        gained = [taught - labels for labels, taught in accuracy]
        share = ratio_interval(gained, [teacher["test_accuracy"] - row for row, _ in accuracy])
        return {
            "rows": rows,
            "teacher": {"source": chosen.members.source, "members": len(teachers), **teacher},
            "chosen": {
                "point": student["point"],
                "temperature": chosen.distill.temperature,
                "alpha": chosen.distill.alpha,
                "average": chosen.distill.average,
                **{key: student[key] for key in self._keys()},
                "hash": student["hash"],
            },
            "trials": self.config.search.trials,
            "seeds": len(pairs) if self.config.confirm.seeds else 0,
            "gain": asdict(mean_interval(gained)),
            "share": share and asdict(share),
            "diagnostics": self._diagnose(chosen, pairs[0], teachers),
        }

    def _diagnose(self, chosen: Config, pair: tuple[Row, Row], teachers: Sequence[Row]) -> Row:
        """Return calibration of a student from labels and of one from its teacher, and fidelity."""
        found = {}
        for name, row, taught_by in zip(("labels", "student"), pair, ((), teachers), strict=True):
            asked = {"student": row["checkpoint"], "teachers": list(taught_by), "diagnose": True}
            scored = run_one(self.executor, "score", config=to_tree(chosen), **asked)
            found[name] = scored["diagnostics"]
        return found

    def _measured(self, models: Sequence[tuple[Sequence[Row], str]]) -> list[Row]:
        """Measure averages of models on validation and test."""
        predicted = self._predictions([row for rows, _ in models for row in rows])
        ensembles = [
            {"members": [{**row, **predicted[row["hash"]]} for row in rows], "average": average}
            for rows, average in models
        ]
        measured: list[Row] = self._ask("measure", ensembles=ensembles)["rows"]
        return measured

    def _predictions(self, rows: Sequence[Row]) -> dict[str, Row]:
        """Let each model answer validation and test images; return the files by hash."""
        jobs: dict[str, Row] = {}
        for row in rows:
            file = self.folder.path / "predictions" / f"{row['hash']}.safetensors"
            jobs[row["hash"]] = {"student": row["checkpoint"], "predictions": str(file)}
        self._ask_all("measuring on the test split", "score", list(jobs.values()))
        return {mark: {"predictions": job["predictions"]} for mark, job in jobs.items()}

    def _costs(self, models: Sequence[Sequence[Row]]) -> list[Row]:
        self.listener.working("timing the answers", 1)
        checkpoints = [_checkpoints(rows) for rows in models]
        distinct = [list(paths) for paths in dict.fromkeys(map(tuple, checkpoints))]
        rows = self._ask("cost", models=distinct, batches=list(BATCHES))["rows"]
        return [rows[distinct.index(paths)] for paths in checkpoints]

    # --- asking ---

    def _ask(self, kind: str, **payload: Any) -> Row:
        return run_one(self.executor, kind, config=to_tree(self.config), **payload)

    def _ask_all(self, title: str, kind: str, payloads: Sequence[Row]) -> list[Row]:
        settings = {"config": to_tree(self.config)}
        jobs = [Job(kind, {**settings, **payload}) for payload in payloads]
        return run_all(self.executor, self.listener, title, jobs)

    def _stage(
        self, name: str, trials: int, plan: Callable[[int, Point], Plan], *, title: str
    ) -> Stage:
        return Stage(
            name=name,
            title=title,
            folder=self.folder.path / name,
            trials=trials,
            plan=plan,
            proposer=Points([{}] * trials),
            metric=self.config.search.metric,
            mode=self.config.search.mode,
        )

    def _trials(self, stage: Stage) -> dict[int, Row]:
        return run_stage(self.config, self.folder, self.executor, self.listener, stage)

    def _run(self, stage: Stage) -> list[Row]:
        """Return the completed trials of a stage, best first."""
        return ranked(self._trials(stage), stage)

    def _once(self, name: str, make: Callable[[], Row]) -> Row:
        """Return what an earlier start has made, else make it and write it down."""
        path = self.folder.path / f"{name}.json"
        if not path.exists():
            save_json(path, make())
        row: Row = load_json(path)
        return row


def finished(folder: RunFolder) -> Row | None:
    """Return the summary of a run that has nothing left to do, else None."""
    path = folder.path / "summary.json"
    return load_json(path) if path.exists() else None


def _checkpoints(rows: Sequence[Row]) -> list[str]:
    return [row["checkpoint"] for row in rows]


def _ensembles(
    sources: dict[Source, list[Row]], average: str
) -> Iterator[tuple[str, tuple[list[Row], str]]]:
    """Yield the names of the table's teachers, with members and average of each."""
    for source, rows in sources.items():
        if source == "members":
            for each in ("probabilities", "logits"):
                yield f"ensemble of {len(rows)}, {each}", (rows, each)
        elif len(rows) == 1:
            yield TITLES[source], (rows, average)
        else:
            yield f"{TITLES[source]}, of {len(rows)}", (rows, average)


def _mean_row(name: str, rows: Sequence[Row]) -> Row:
    keys = [key for key in rows[0] if isinstance(rows[0][key], float)]
    means: Row = {key: sum(row[key] for row in rows) / len(rows) for key in keys}
    interval: Interval = mean_interval([row["test_accuracy"] for row in rows])
    return {
        "name": name,
        **means,
        "low": interval.low,
        "high": interval.high,
        "runs": [row["test_accuracy"] for row in rows],
    }
