"""An experiment: settings side by side, each trained on the same seeds.

What a search finds is the best of many. What a setting does is seen where nothing else differs: the
seeds, and with them initialisation and order, are the same for all arms, and each difference is
taken seed by seed. An arm may be the teacher of a later one, so whole lineages are repeated.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from selfkd.analysis.statistics import mean_interval, paired_interval, ratio_interval
from selfkd.analysis.verdicts import compare, count_seeds
from selfkd.config import ArmConfig, Config, ContrastConfig, DataConfig, to_tree
from selfkd.config.space import Point, Points
from selfkd.errors import ConfigError, RunError
from selfkd.execution.jobs import Executor, Job, run_one
from selfkd.experiments.arms import confirm_seeds
from selfkd.experiments.ensemble import CompressionListener, find_members, measure_models, teach
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.stages import Plan, Stage, label, run_all, run_stages
from selfkd.results import Row
from selfkd.storage.files import load_json, save_json
from selfkd.storage.remote import as_path

MEMBERS = "members"
FREE = ("data.train_size", "data.classes", "data.crop", "data.flip", "data.jitter", "data.views")
"""What an arm may change of the data: its training images and their views."""


def check_study(config: Config) -> None:
    """Check what can be known of the arms before anything starts.

    Raises:
        ConfigError: with every fault.
    """
    faults = list(_faults(config))
    if faults:
        raise ConfigError("\n".join(faults))
    for run in config.members.runs:
        find_members(run)


def _faults(config: Config) -> Iterator[str]:
    arms, before = config.study.arms, list[str]()
    if config.student is not None:
        yield f"student: not of a study, got {config.student.name}: set model, or it in an arm"
    if not arms:
        yield "study.arms must have at least one arm, got none: see tune_configs/anchors/"
    if config.confirm.seeds < 1:
        yield f"confirm.seeds must be at least 1, got {config.confirm.seeds}"
    for name, arm in arms.items():
        where = f"study.arms.{name}"
        if name == MEMBERS or not name.replace("_", "").replace("-", "").isalnum():
            yield f"{where}: a name must be of letters, digits, - and _, and not {MEMBERS}"
        for other in (*arm.teachers, *arm.average):
            if other == MEMBERS and other in arm.teachers:
                if not (config.members.runs or config.members.checkpoints):
                    yield f"{where}.teacher: {MEMBERS} must be given, by --from RUN"
            elif other not in before:
                known = ", ".join([MEMBERS, *before])
                yield f"{where}: must name arms that stand before it ({known}), got {other!r}"
            elif 1 < _seeds(config, arms[other]) < _seeds(config, arm):
                yield f"{where}: {other} must have 1 seed or at least as many as {name}"
        if arm.average and (arm.set or arm.teachers):
            yield f"{where}: must have average alone, with nothing to train, or no average"
        if arm.knowledge in ("permuted", "confidence") and not arm.teachers:
            yield f"{where}.teacher must be given with knowledge {arm.knowledge}"
        if arm.knowledge == "virtual" and arm.teachers:
            yield f"{where}.teacher must not be given with knowledge virtual, got {arm.teacher!r}"
        for key in arm.set:
            data = key.startswith("data.") and key not in FREE
            if data or key.split(".")[0] not in ("data", "model", "train", "distill"):
                known = f"model, train, distill or of {', '.join(FREE)}"
                yield f"{where}.set: must be keys of {known}, got {key}"
        try:
            config.at(arm.set)
        except ConfigError as error:
            yield from (f"{where}.set: {line}" for line in str(error).splitlines())
        before.append(name)
    for number, contrast in enumerate(config.study.compare):
        for name in filter(None, (contrast.arm, contrast.to, contrast.towards)):
            if name not in arms and not (name == MEMBERS and name == contrast.towards):
                yield f"study.compare.{number}: must name arms ({', '.join(arms)}), got {name!r}"


def _seeds(config: Config, arm: ArmConfig) -> int:
    return arm.seeds or config.confirm.seeds


def contrasts(config: Config) -> list[ContrastConfig]:
    """Return what is compared: what is asked for, else each arm with the first one."""
    first, *others = config.study.arms
    return config.study.compare or [ContrastConfig(arm=name, to=first) for name in others]


def trainings(config: Config) -> int:
    """Return how many students are trained."""
    return sum(_seeds(config, arm) for arm in config.study.arms.values() if not arm.average)


def experiment(
    config: Config, folder: RunFolder, executor: Executor, listener: CompressionListener
) -> Row:
    """Train and measure the arms of a study; what is done is kept.

    Args:
        config: of the run.
        folder: what is done, and where the rest goes.
        executor: runs the trials.
        listener: is told of everything.

    Returns:
        The summary, saved as `summary.json`: of each of `arms` its `runs`, one a seed (`seed`,
        `val_accuracy`, `test_accuracy`, `errors`, `agreement` with its teachers, and of classes
        that it was trained on no image of, `unseen`), the `mean` of test accuracy and of `errors`
        with intervals; `members`, if they teach; and of each of `contrasts` the paired
        `difference` (none where no seed is in both), the `share` of the way to a third, and a
        `verdict`.

    Raises:
        ConfigError: the data, the models or the members are not as the config says.
        RunError: all trials of an arm failed.
    """
    return _Experiment(config, folder, executor, listener).run()


@dataclass(frozen=True)
class _Experiment:
    config: Config
    folder: RunFolder
    executor: Executor
    listener: CompressionListener

    def run(self) -> Row:
        arms = self.config.study.arms
        facts = {
            name: self._check(self._own(arm), f"study.arms.{name}: ")
            for name, arm in arms.items()
            if not arm.average
        }
        members = self._members()
        trials: dict[str, list[Row]] = {}
        for names in self._waves():
            trials |= self._train(names, trials, members, facts)
        measured = self._measure(trials)
        summary = self._summary(measured, members)
        save_json(self.folder.path / "summary.json", summary)
        return summary

    def _own(self, arm: ArmConfig) -> Config:
        return self.config.at(arm.set)

    def _check(self, config: Config, where: str = "") -> Row:
        """Return the facts of a config's data."""
        checked = run_one(self.executor, "check", config=to_tree(config))
        if "fault" in checked:
            raise ConfigError(f"{where}{checked['fault']}")
        facts: Row = checked["facts"]
        return facts

    def _members(self) -> list[Row]:
        """Return the teachers from elsewhere."""
        if not any(MEMBERS in arm.teachers for arm in self.config.study.arms.values()):
            self.folder.keep(self.config, self._check(self.config))
            return []
        return teach(self.config, self.folder, self.executor, self.listener)(self.config)

    def _waves(self) -> list[list[str]]:
        """Return the arms that can be trained side by side, one lot after the other."""
        depth: dict[str, int] = {}
        for name, arm in self.config.study.arms.items():
            if not arm.average:
                taught = [depth.get(other, 0) for other in arm.teachers]
                depth[name] = 1 + max(taught, default=0)
        lots = sorted(set(depth.values()))
        return [[name for name in depth if depth[name] == lot] for lot in lots]

    def _path(self, name: str) -> Path:
        return self.folder.path / "arms" / name

    def _train(
        self,
        names: Sequence[str],
        done: dict[str, list[Row]],
        members: Sequence[Row],
        facts: dict[str, Row],
    ) -> dict[str, list[Row]]:
        """Train arms side by side; return the completed trials of each, in order of the seeds."""
        config, stages, teachers = self.config, [], dict[str, list[list[Row]]]()
        labelled = set[tuple[str, DataConfig]]()
        for name in names:
            arm = config.study.arms[name]
            seeds = confirm_seeds(config, _seeds(config, arm))
            teachers[name] = [
                self._teachers(arm, number, done, members) for number in range(len(seeds))
            ]
            own = self._own(arm)
            asked = {
                row["hash"]: row
                for each in teachers[name]
                for row in each
                if (row["hash"], own.data) not in labelled
            }
            if asked and not own.distill.live:
                labelled |= {(mark, own.data) for mark in asked}
                label(
                    own,
                    self.folder,
                    self.executor,
                    self.listener,
                    title=f"labelling for {name}",
                    teachers=list(asked.values()),
                    facts=facts[name],
                )
            stages.append(self._stage(name, arm, seeds, teachers[name]))
        title = f"{', '.join(names)}: {count_trained(len(names))}"
        found = run_stages(config, self.folder, self.executor, self.listener, stages, title=title)
        trials = {}
        for name, stage, rows in zip(names, stages, found, strict=True):
            trials[name] = [
                {
                    **row,
                    "number": number,
                    "checkpoint": str(stage.trial(number) / "student.safetensors"),
                    "taught_by": teachers[name][number],
                }
                for number, row in sorted(rows.items())
                if row["status"] == "completed"
            ]
            failed = len(rows) - len(trials[name])
            if failed:
                self.listener.noted(f"{failed} of the {len(rows)} trials of {name} failed")
        return trials

    def _stage(
        self, name: str, arm: ArmConfig, seeds: Sequence[int], teachers: Sequence[Sequence[Row]]
    ) -> Stage:
        own = self._own(arm)
        more = {} if arm.knowledge == "whole" else {"knowledge": arm.knowledge}
        plan = Plan(config=own, model=own.model, seed=0, more=more)

        def planned(number: int, point: Point) -> Plan:
            return replace(plan, seed=seeds[number], teachers=teachers[number])

        return Stage(
            name=name,
            title=name,
            folder=self._path(name),
            trials=len(seeds),
            plan=planned,
            proposer=Points([arm.set] * len(seeds)),
        )

    def _teachers(
        self, arm: ArmConfig, number: int, done: dict[str, list[Row]], members: Sequence[Row]
    ) -> list[Row]:
        """Return those who teach the trial of a seed: `hash`, `checkpoint`, perhaps `weight`."""
        found: list[Row] = []
        for name in arm.teachers:
            if name == MEMBERS:
                found += members
                continue
            row = next(iter(self._of_seed(name, done[name], number)), None)
            if row is None:
                raise ConfigError(f"the trial of {name} that is to teach seed {number} has failed")
            found.append({"hash": row["hash"], "checkpoint": row["checkpoint"]})
        return found

    def _of_seed(self, name: str, rows: Sequence[Row], number: int) -> list[Row]:
        """Return an arm's row of a seed, or that of its only seed; none if it failed."""
        alone = name == MEMBERS or _seeds(self.config, self.config.study.arms[name]) == 1
        return [row for row in rows if alone or row["number"] == number]

    def _measure(self, trials: dict[str, list[Row]]) -> dict[str, list[Row]]:
        """Measure each student, and each average of students, on the test split once."""
        waiting = []
        for name, rows in trials.items():
            own = to_tree(self._own(self.config.study.arms[name]))
            for row in rows:
                path = as_path(row["checkpoint"]).with_name("score.json")
                payload = {
                    "config": own,
                    "student": row["checkpoint"],
                    "predictions": _predictions(row),
                    "teachers": row["taught_by"],
                }
                if not path.exists():
                    waiting.append((path, Job("score", payload)))
        jobs = [job for _, job in waiting]
        scores = run_all(self.executor, self.listener, "testing", jobs) if jobs else []
        for (path, _), score in zip(waiting, scores, strict=True):
            save_json(path, score)
        keys = ("number", "seed", "hash", "val_accuracy", "val_nll", "train_seconds")
        measured = {}
        for name, arm in self.config.study.arms.items():
            if arm.average:
                measured[name] = self._averages(arm, trials)
                continue
            measured[name] = [
                {
                    **{key: row[key] for key in keys},
                    "checkpoint": self.folder.relative(as_path(row["checkpoint"])),
                    **load_json(as_path(row["checkpoint"]).with_name("score.json")),
                }
                for row in trials[name]
            ]
        return measured

    def _averages(self, arm: ArmConfig, trials: dict[str, list[Row]]) -> list[Row]:
        """Measure the ensemble of arms, seed by seed."""
        found, ensembles = [], []
        for number, seed in enumerate(confirm_seeds(self.config, _seeds(self.config, arm))):
            rows = [
                row for name in arm.average for row in self._of_seed(name, trials[name], number)
            ]
            if len(rows) == len(arm.average):
                found.append({"number": number, "seed": seed})
                members = [{"hash": r["hash"], "predictions": _predictions(r)} for r in rows]
                ensembles.append({"members": members})
        if not found:
            arms = " and ".join(arm.average)
            raise RunError(f"{arms} have no seed on which all were trained, so no average")
        config = to_tree(self.config)
        rows = run_one(self.executor, "measure", config=config, ensembles=ensembles)["rows"]
        return [{**own, **row} for own, row in zip(found, rows, strict=True)]

    def _summary(self, measured: dict[str, list[Row]], members: Sequence[Row]) -> Row:
        images = load_json(self.folder.path / "data.json")["images"]["test"]
        rows = {name: _arm_row(name, runs, images) for name, runs in measured.items()}
        summary: Row = {"images": images, "seeds": self.config.confirm.seeds, "members": None}
        towards = {**rows}
        if members:
            asked = (members, self.config.distill.average)
            (row,) = measure_models(
                self.config, self.folder, self.executor, self.listener, [asked], [0]
            )
            summary["members"] = {"count": len(members), **row, "errors": _errors(row, images)}
            towards[MEMBERS] = {"runs": [{"number": 0, **summary["members"]}]}
        summary["arms"] = list(rows.values())
        summary["contrasts"] = [
            self._contrast(contrast, rows, towards) for contrast in contrasts(self.config)
        ]
        return summary

    def _contrast(
        self, contrast: ContrastConfig, arms: dict[str, Row], towards: dict[str, Row]
    ) -> Row:
        """Return the paired difference of two arms, and which share of the way to a third it is."""
        own, other = arms[contrast.arm]["runs"], arms[contrast.to]["runs"]
        pairs = [(a, b) for a in own for b in other if a["number"] == b["number"]]
        if not pairs:
            verdict = f"{contrast.arm} and {contrast.to} have no seed on which both were trained"
            return {**asdict(contrast), "difference": None, "verdict": verdict, "share": None}
        values, others = (
            [row["test_accuracy"] for row in side] for side in zip(*pairs, strict=True)
        )
        difference = asdict(paired_interval(values, others))
        verdict = compare(contrast.arm, contrast.to, difference, count_seeds(len(pairs)))
        row = {**asdict(contrast), "difference": difference, "verdict": verdict, "share": None}
        if contrast.towards:
            third = towards[contrast.towards]["runs"]
            ways = [
                (
                    row["test_accuracy"] - pair["test_accuracy"],
                    end["test_accuracy"] - pair["test_accuracy"],
                )
                for row, pair in pairs
                for end in self._of_seed(contrast.towards, third, row["number"])
            ]
            share = ratio_interval(*zip(*ways, strict=True)) if ways else None
            row["share"] = None if share is None else asdict(share)
        return row


def _predictions(row: Row) -> str:
    return str(as_path(row["checkpoint"]).with_name("predictions.safetensors"))


def _errors(row: Row, images: int) -> int:
    return round(float(1 - row["test_accuracy"]) * images)


def _arm_row(name: str, runs: Sequence[Row], images: int) -> Row:
    for row in runs:
        row["errors"] = _errors(row, images)
        if (row.get("unseen") or {}).get("classes"):
            for biased in (row["unseen"], row["unseen"]["all_biased"]):
                biased["errors"] = _errors(biased, images)
    found: Row = {
        "name": name,
        "runs": list(runs),
        "mean": asdict(mean_interval([row["test_accuracy"] for row in runs])),
        "errors": asdict(mean_interval([float(row["errors"]) for row in runs])),
        "val_accuracy": sum(row["val_accuracy"] for row in runs) / len(runs),
    }
    unseen = [row["unseen"] for row in runs if "errors" in (row.get("unseen") or {})]
    if unseen:
        for key, rows in (
            ("biased_errors", unseen),
            ("all_biased_errors", [row["all_biased"] for row in unseen]),
        ):
            found[key] = asdict(mean_interval([float(row["errors"]) for row in rows]))
    agreements = [row["agreement"] for row in runs if "agreement" in row]
    if agreements:
        found["agreement"] = asdict(mean_interval(agreements))
    return found


def count_trained(arms: int) -> str:
    """Return how many arms are trained side by side, in words."""
    return "one arm" if arms == 1 else f"{arms} arms side by side"
