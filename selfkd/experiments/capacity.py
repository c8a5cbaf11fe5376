"""Students of growing size, the same teachers: where distillation helps.

Cho, Hariharan, "On the Efficacy of Knowledge Distillation", 2019,
https://arxiv.org/abs/1910.01348 (students that are too small to follow their teacher)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from selfkd.analysis.verdicts import count
from selfkd.config import Config, to_tree
from selfkd.config.space import Point, Points
from selfkd.errors import ConfigError
from selfkd.execution.jobs import Executor, run_one
from selfkd.experiments.curve import compare_size, judge, mean_gain, tell_curve
from selfkd.experiments.ensemble import CompressionListener, measure_models, teach
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.stages import Plan, Stage, make_proposer, ranked, run_stage, trial_seed
from selfkd.results import Row
from selfkd.storage.files import save_json
from selfkd.storage.remote import as_path

DISTILL = ("distill.temperature", "distill.alpha")
Teach = Callable[[Config], list[Row]]


def grow(
    config: Config, folder: RunFolder, executor: Executor, listener: CompressionListener
) -> Row:
    """Train students of each size from labels only and from the teachers; what is done is kept.

    Both are trained on the same fresh seeds (`confirm.seeds`), each size on the same ones. The
    intervals are over these seeds, for these teachers and this test split.

    Args:
        config: of the run.
        folder: what is done, and where the rest goes.
        executor: runs the trials.
        listener: is told of everything.

    Returns:
        The summary, saved as `summary.json`: the `teacher`, and for each of `sizes`, the smallest
        first, `value` of the key, `parameters`, test accuracy from `labels` and `taught` (`value`,
        `low`, `high`, `runs`), their paired `difference`, `p` and `p_holm`, the `room` between
        labels only and the teacher, and a `verdict`; `mean_gain` over the sizes; `verdict` and what
        else is `said` in words.

    Raises:
        ConfigError: the data, the models or the members are not as the config says.
        RunError: all trials of a stage failed.
    """
    return _Growth(config, folder, executor, listener).run()


def check_sizes(config: Config) -> None:
    """Check what can be known of the sizes before anything starts.

    Raises:
        ConfigError: with every fault.
    """
    capacity, faults = config.capacity, []
    root = capacity.key.partition(".")[0]
    wanted = "student" if config.student is not None else "model"
    if root != wanted:
        why = "as there is a student" if config.student else "as student is not given"
        faults.append(f"capacity.key must begin with {wanted}., {why}, got {capacity.key}")
    told = [repr(value) for value in capacity.values]
    if len(set(told)) < len(told):
        faults.append(f"capacity.values must be different ones, got {capacity.values}")
    if capacity.key in {**config.search.space, **config.search.labels_only_space}:
        faults.append(f"search.space must not hold capacity.key, got {capacity.key} in both")
    if config.confirm.seeds < 1:
        faults.append(f"confirm.seeds must be at least 1, got {config.confirm.seeds}")
    if config.train.init != "fresh":
        faults.append(
            f"train.init must be fresh for students of other sizes, got {config.train.init}"
        )
    for value in capacity.values:
        try:
            config.at({capacity.key: value})
        except ConfigError as error:
            faults.append(f"capacity.values: {error}")
    if faults:
        raise ConfigError("\n".join(faults))


def trainings(config: Config) -> int:
    """Return how many students are trained on fresh seeds."""
    return 2 * config.confirm.seeds * len(config.capacity.values)


@dataclass(frozen=True)
class _Growth:
    config: Config
    folder: RunFolder
    executor: Executor
    listener: CompressionListener

    def run(self) -> Row:
        students = self._students()
        teach_as = teach(self.config, self.folder, self.executor, self.listener)
        points = [self._points(student, teach_as) for student in students]
        pairs = self._train(students, points, teach_as)
        summary = self._measure(students, points, pairs, teach_as)
        save_json(self.folder.path / "summary.json", summary)
        self._prune(summary)
        return summary

    def _students(self) -> list[Row]:
        """Try every student; return value, parameters and folder of each, the smallest first."""
        capacity, rows, faults = self.config.capacity, [], []
        for number, value in enumerate(capacity.values):
            own = self.config.at({capacity.key: value})
            checked = run_one(self.executor, "check", config=to_tree(own))
            if "fault" in checked:
                faults.append(f"capacity.values {value}: {checked['fault']}")
                continue
            parameters = checked["facts"]["parameters"]["1"]
            search = f"search_{number:03d}"
            rows.append({"value": value, "parameters": parameters, "search": search})
        if faults:
            raise ConfigError("\n".join(faults))
        rows.sort(key=lambda row: int(row["parameters"]))
        save_json(self.folder.path / "students.json", {"key": capacity.key, "students": rows})
        return rows

    def _points(self, student: Row, teach_as: Teach) -> tuple[Point, Point]:
        """Return the settings of a size from labels only and taught, searched on validation."""
        config = self.config
        size: Point = {config.capacity.key: student["value"]}
        distill = config.distill
        fixed = dict(zip(DISTILL, (distill.temperature, distill.alpha), strict=True))
        if not config.capacity.search:
            return size, {**size, **fixed}
        labels = self._search(student, size, None) if config.space(taught=False) else {}
        return {**size, **labels}, {**size, **fixed, **self._search(student, size, teach_as)}

    def _search(self, student: Row, size: Point, teach_as: Teach | None) -> Point:
        """Return the best point for a size."""
        config, taught = self.config, teach_as is not None
        name = student["search"] if taught else f"labels_{student['search']}"

        def plan(number: int, point: Point) -> Plan:
            own = config.at({**size, **point})
            return Plan(
                config=own,
                model=own.student or own.model,
                seed=trial_seed(config.seed, name, number),
                teachers=teach_as(own) if teach_as is not None else (),
            )

        how = "from the teachers" if taught else "from labels only"
        stage = Stage(
            name=name,
            title=f"search for student {student['value']} {how}",
            folder=self.folder.path / name,
            trials=config.search.trials,
            plan=plan,
            proposer=make_proposer(
                config, config.space(taught=taught), seed=trial_seed(config.seed, name, -1)
            ),
            early_stopping=True,
            metric=config.search.metric,
            mode=config.search.mode,
        )
        trials = run_stage(config, self.folder, self.executor, self.listener, stage)
        for number in trials:  # the ledger keeps their results
            (stage.trial(number) / "student.safetensors").unlink(missing_ok=True)
        best: Point = ranked(trials, stage)[0]["point"]
        return best

    def _train(
        self, students: Sequence[Row], points: Sequence[tuple[Point, Point]], teach_as: Teach
    ) -> list[list[tuple[Row, Row]]]:
        """Train all sizes side by side; return for each its pairs, one a seed."""
        config, seeds = self.config, self.config.confirm.seeds
        # size by size: the pairs of one from labels only, then taught
        settings = [point for both in points for point in both for _ in range(seeds)]

        def plan(number: int, point: Point) -> Plan:
            own = config.at(point)
            return Plan(
                config=own,
                model=own.student or own.model,
                seed=trial_seed(config.seed, "capacity", number % seeds),
                teachers=teach_as(own) if number // seeds % 2 else (),
            )

        stage = Stage(
            name="students",
            title=f"students of {len(students)} sizes, labels only and taught, "
            f"{count(seeds, 'seed')}",
            folder=self.folder.path / "students",
            trials=len(settings),
            plan=plan,
            proposer=Points(settings),
            metric=config.search.metric,
            mode=config.search.mode,
        )
        trials = run_stage(config, self.folder, self.executor, self.listener, stage)
        done = {
            number: {**row, "checkpoint": str(stage.trial(number) / "student.safetensors")}
            for number, row in trials.items()
            if row["status"] == "completed"
        }
        found = []
        for number, student in enumerate(students):
            first = 2 * seeds * number
            both = [(first + pair, first + seeds + pair) for pair in range(seeds)]
            pairs = [(done[a], done[b]) for a, b in both if a in done and b in done]
            if len(pairs) < seeds:
                self.listener.noted(
                    f"only {len(pairs)} of the {seeds} pairs of student {student['value']} "
                    "were trained"
                )
            found.append(pairs)
        return found

    def _measure(
        self,
        students: Sequence[Row],
        points: Sequence[tuple[Point, Point]],
        pairs: Sequence[Sequence[tuple[Row, Row]]],
        teach_as: Teach,
    ) -> Row:
        config, average = self.config, self.config.distill.average
        teachers = teach_as(config)
        models: list[tuple[Sequence[Row], str]] = [(teachers, average)]
        timed, firsts = [0], []
        for of_size in pairs:
            firsts.append(len(models))
            timed += [len(models)] if of_size else []
            models += [([row], average) for pair in of_size for row in pair]
        rows = measure_models(config, self.folder, self.executor, self.listener, models, timed)
        teacher = {"members": len(teachers), "source": config.members.source, **rows[0]}
        sizes = []
        for student, point, of_size, first in zip(students, points, pairs, firsts, strict=True):
            if of_size:
                measured = rows[first : first + 2 * len(of_size)]
                size = compare_size(measured[::2], measured[1::2], teacher["test_accuracy"])
                sizes.append({**student, **size, **self._cost(measured[0], of_size, point)})
        if not sizes:
            raise RuntimeError("no pair of students could be trained on one seed")
        judge(sizes)
        gain = mean_gain(sizes)
        verdict, *said = tell_curve(sizes, gain)
        return {
            "key": config.capacity.key,
            "seeds": config.confirm.seeds,
            "searched": config.capacity.search,
            "trials": config.search.trials if config.capacity.search else 0,
            "teacher": teacher,
            "sizes": sizes,
            "mean_gain": gain,
            "verdict": verdict,
            "said": said,
        }

    def _cost(self, row: Row, pairs: Sequence[tuple[Row, Row]], point: tuple[Point, Point]) -> Row:
        """Return what a student costs to run and took to train, and where the best of it lies."""
        taught = [own for _, own in pairs]
        config = self.config
        sign = 1 if config.search.mode == "max" else -1
        best = max(taught, key=lambda own: (sign * own[config.search.metric], -own["val_nll"]))
        searched = config.search.trials if config.capacity.search else 1
        seconds = sum(own["train_seconds"] for own in taught) / len(taught)
        return {
            **{key: row[key] for key in ("ms_1", "ms_128")},
            "temperature": point[1][DISTILL[0]],
            "alpha": point[1][DISTILL[1]],
            "trials": searched,
            "train_seconds": searched * seconds,
            "checkpoint": self.folder.relative(as_path(best["checkpoint"])),
        }

    def _prune(self, summary: Row) -> None:
        """Remove all students but the best taught one of each size."""
        kept = {size["checkpoint"] for size in summary["sizes"]}
        for student in (self.folder.path / "students").glob("trial_*/student.safetensors"):
            if self.folder.relative(student) not in kept:
                student.unlink()
