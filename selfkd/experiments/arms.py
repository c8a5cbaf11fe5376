"""The engine: an arm is a setting, which is searched, replicated on fresh seeds and evaluated.

A chosen model is the best of many, so its metrics are optimistic. Its setting on fresh seeds is
chosen by nobody; and where two settings share their seeds, and with them initialisation and order,
the difference of each pair says what the setting does.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from selfkd.analysis.families import Terms
from selfkd.config import Config, ModelConfig, to_tree, uses_pretrained
from selfkd.config.space import Distribution, Points
from selfkd.errors import ConfigError, RunError
from selfkd.execution.jobs import (
    Beside,
    EarlyStopping,
    Executor,
    FailedJobError,
    Job,
    run_all,
    run_one,
)
from selfkd.experiments.choice import choose
from selfkd.experiments.replicas import confirm_seeds, make_terms
from selfkd.experiments.run_folder import RunFolder, student_file
from selfkd.experiments.stages import Stage, make_proposer, run_stages, trial_seed
from selfkd.results import (
    Evaluation,
    Events,
    Facts,
    Message,
    Mode,
    Model,
    Point,
    Row,
    RunFinished,
    Summary,
    TaskProgressed,
    TaskStarted,
    TrialResult,
    from_row,
)
from selfkd.storage.files import link, remove_file
from selfkd.storage.rows import load_row, save_row

ATTEMPTS = 2  # at a part that fails, beside what the executor does for dead workers
BATCHES = (1, 128)  # numbers of items whose prediction is timed
TITLE = "confirmation on fresh seeds"

S = TypeVar("S", bound=Summary)
Teachers = Callable[[Config, int], Sequence[Model]]
"""Teachers of a trial, by its config and its number."""


@dataclass(frozen=True, kw_only=True)
class Arm:
    """A setting."""

    name: str
    """Name of its stage: in W&B, in messages and in the seeds of its search."""
    title: str = TITLE
    folder: Path
    """Folder of its trials."""
    point: Point = field(default_factory=dict)
    """Settings in which it differs from the config, by dotted key."""
    teachers: Teachers = lambda config, number: ()
    network: Callable[[Config, int], ModelConfig] = lambda config, number: config.network()
    options: Callable[[int], Row] = lambda number: {}
    """Further arguments of the training job, by number."""
    space: Mapping[str, Distribution] = field(default_factory=dict)
    """What its search varies."""
    points: Sequence[Point] = ()
    """Points that its search tries first."""
    seeds: Sequence[int] | None = None
    """Fresh seeds that it is replicated on; those of the run's confirmation when not given."""
    seed_name: str | int | None = None
    """Name that the seeds of its search come from; its own when not given."""
    without: Collection[int] = ()
    """Numbers of seeds that it is not replicated on."""

    def model(self, run: Run, trial: TrialResult) -> Model:
        """Return the student of a trial."""
        path = student_file(self.folder, trial.trial)
        return Model(trial.hash, run.folder.relative(path))


@dataclass(frozen=True)
class Searched:
    """The trials of a search."""

    trials: Sequence[TrialResult]
    ranked: Sequence[TrialResult]
    """Those that completed, the one that is taken first, then the best first."""
    models: Sequence[Model]
    """Students that are kept, best first."""

    @property
    def best(self) -> TrialResult:
        """The trial that was chosen."""
        return self.ranked[0]


@dataclass(frozen=True)
class Request:
    """A model to evaluate, and what of it."""

    model: Model
    teachers: Sequence[Model] = ()
    """Teachers for the agreement with their average."""
    diagnose: bool = False
    """Whether to look at calibration and confusions too."""
    config: Config | None = None
    """Config of its data; the run's when not given."""
    logits: bool = True
    """Whether its logits are kept, for averages, where what was found is."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run at work."""

    config: Config
    folder: RunFolder
    executor: Executor
    events: Events
    function: str | None = None
    """Reference of a user's training function, `path/file.py:name`."""

    @property
    def metric(self) -> str:
        """Metric that is reported: of the test split, or that of a user's training function."""
        return self.config.search.metric if self.function else f"test_{self.folder.facts.metric}"

    @property
    def mode(self) -> Mode:
        """Whether more of it is better, or less."""
        return self.config.search.mode if self.function else self.folder.facts.mode

    @property
    def terms(self) -> Terms:
        """How differences of the reported metric are judged and written."""
        return make_terms(self.config, self.metric, self.mode, self.folder.facts)

    def seeds(self, arm: Arm) -> Sequence[int]:
        """Return the fresh seeds of an arm."""
        return confirm_seeds(self.config) if arm.seeds is None else arm.seeds

    def search(
        self, arm: Arm, *, save: Path | None = None, keep: int = 1, last: Point | None = None
    ) -> Searched:
        """Search an arm's space on validation; trials that are done are kept.

        Args:
            arm: Setting to search from.
            save: File for the best trial's student; no student is kept when not given.
            keep: Number of students that are kept, the best first.
            last: Winner of a search before, which is tried first.

        Raises:
            RunError: All trials failed.
        """
        search, config = self.config.search, self.config
        named = arm.name if arm.seed_name is None else arm.seed_name
        early = EarlyStopping(config.train.epochs, search.metric, search.mode)
        fixed = self.folder.facts.fixed
        space = {key: values for key, values in arm.space.items() if key not in fixed}
        points = [{k: v for k, v in point.items() if k not in fixed} for point in arm.points]
        proposer = make_proposer(
            config,
            space,
            seed=trial_seed(config.seed, named, -1),
            last=last,
            more=[point for point in points if point],
        )
        stage = Stage(
            name=arm.name,
            folder=arm.folder,
            seeds=[trial_seed(config.seed, named, number) for number in range(search.trials)],
            proposer=proposer,
            payload=partial(self._payload, arm),
            metric=search.metric,
            mode=search.mode,
            early=early if search.scheduler == "asha" else None,
        )
        (trials,) = run_stages(self.executor, self.events, [stage], title=arm.title)
        items = self.folder.facts.count("val")
        ranked = choose(config, space, stage.ranked(trials), items=items)
        kept = [arm.model(self, trial) for trial in ranked[: keep if save else 0]]
        if save is not None:
            source = self.folder.path / kept[0].checkpoint
            if source.exists():
                link(source, save)
            kept[0] = Model(kept[0].hash, self.folder.relative(save))
        others = {model.checkpoint for model in kept}
        for trial in trials:
            if arm.model(self, trial).checkpoint not in others:
                remove_file(student_file(arm.folder, trial.trial))
        return Searched(trials, ranked, kept)

    def replicate(
        self, arms: Sequence[Arm], *, title: str = TITLE, each: bool = True
    ) -> list[list[TrialResult]]:
        """Train each arm on each of its seeds, all side by side; what is done is kept.

        Args:
            arms: Settings to train.
            title: Name of the work, for people.
            each: Whether some trial of each arm must complete, or only some of all.

        Returns:
            For each arm the completed trials, in order of the seeds.

        Raises:
            RunError: All trials of an arm failed, or of all arms.
        """
        search = self.config.search
        stages = []
        for arm in arms:
            seeds = self.seeds(arm)
            stages.append(
                Stage(
                    name=arm.name,
                    folder=arm.folder,
                    seeds=seeds,
                    proposer=Points([{}] * len(seeds)),
                    payload=partial(self._payload, arm),
                    metric=search.metric,
                    mode=search.mode,
                    without=arm.without,
                )
            )
        found = run_stages(self.executor, self.events, stages, title=title, each=each)
        done = [[trial for trial in rows if trial.status == "completed"] for rows in found]
        wanted = sum(len(stage.numbers) for stage in stages)
        if failed := wanted - sum(map(len, done)):
            self.events(Message(f"{failed} of the {wanted} trials of the {title} failed"))
        return done

    def _payload(self, arm: Arm, number: int, point: Point) -> Row:
        point = {**arm.point, **point}
        # without the points of its search, which are as many as there are trials
        own = replace(self.config, search=replace(self.config.search, points=[])).at(point)
        if uses_pretrained(own) and not uses_pretrained(self.config):
            raise RunError(f"{point} must not be pretrained, as the config is not")
        model = arm.network(own, number)
        return {
            "config": to_tree(own),
            "point": point,
            "model": {"name": model.name, "args": model.args},
            "teachers": self.rows(arm.teachers(own, number)),
            "targets": str(self.folder.targets(own)),
            **({"function": self.function} if self.function else {}),
            **arm.options(number),
        }

    def rows(self, models: Sequence[Model]) -> list[Row]:
        """Return models as a worker takes them, with absolute paths."""
        return [
            {
                "hash": model.hash,
                "checkpoint": str(self.folder.file(model.checkpoint)),
                **({} if model.weight is None else {"weight": model.weight}),
            }
            for model in models
        ]

    def evaluate(
        self,
        requests: Sequence[Request],
        *,
        title: str,
        keep: bool = True,
        beside: Sequence[Beside] = (),
    ) -> list[Evaluation]:
        """Evaluate models on validation and test, each once.

        Args:
            requests: Models, and what of them.
            title: Name of the work, for people.
            keep: Whether their logits and what was found are kept, for averages and for a resume;
                else the test split alone is read.
            beside: Further jobs to run beside these.
        """
        found: dict[str, Evaluation] = {}
        waiting = {}
        for request in requests:
            file = self.folder.path / "predictions" / f"{request.model.hash}.json"
            known = load_row(Evaluation, file) if keep and file.exists() else None
            if known is not None and (known.diagnostics or not request.diagnose):
                found[request.model.hash] = known
            else:
                waiting[request.model.hash] = request
        payloads = [self._request(request, keep=keep) for request in waiting.values()]
        rows = list[Row]()
        if payloads or beside:
            rows = self.jobs(title, "evaluate", payloads, beside=beside)
        for digest, row in zip(waiting, rows, strict=True):
            found[digest] = from_row(Evaluation, row)
            if keep:
                save_row(self.folder.path / "predictions" / f"{digest}.json", found[digest])
        return [found[request.model.hash] for request in requests]

    def _request(self, request: Request, *, keep: bool) -> Row:
        (model,) = self.rows([request.model])
        return {
            "config": to_tree(request.config or self.config),
            "student": model["checkpoint"],
            "predictions": self._predictions(model["hash"]) if keep and request.logits else None,
            "validate": keep,
            "teachers": self.predicted(request.teachers),
            "diagnose": request.diagnose,
        }

    def _predictions(self, digest: str) -> str:
        return str(self.folder.path / "predictions" / f"{digest}.safetensors")

    def average(
        self,
        ensembles: Sequence[tuple[Sequence[Model], str]],
        *,
        beside: Sequence[Beside] = (),
    ) -> list[Evaluation]:
        """Evaluate averages of models that were evaluated and kept, beside further jobs."""
        averages = [
            {"members": self.predicted(models), "average": average} for models, average in ensembles
        ]
        rows = self.job("average", beside=beside, ensembles=averages)["rows"]
        return [from_row(Evaluation, row) for row in rows]

    def predicted(self, models: Sequence[Model]) -> list[Row]:
        """Return models with the files of their logits."""
        return [row | {"predictions": self._predictions(row["hash"])} for row in self.rows(models)]

    def time(self, models: Sequence[Sequence[Model]]) -> list[Row]:
        """Return parameters and milliseconds an item of models, or of several one after another."""
        self.events(TaskStarted("timing the predictions", 1))
        paths = [[row["checkpoint"] for row in self.rows(rows)] for rows in models]
        distinct = [list(each) for each in dict.fromkeys(map(tuple, paths))]
        rows = self.job("time", models=distinct, batches=list(BATCHES))["rows"]
        return [rows[distinct.index(each)] for each in paths]

    def finish(self, summary: S) -> S:
        """Save the summary of the run; return it."""
        save_row(self.folder.path / "summary.json", summary)
        self.events(RunFinished(summary))
        return summary

    def check(
        self,
        config: Config | None = None,
        *,
        where: str = "",
        teachers: Sequence[ModelConfig | Model] = (),
    ) -> Facts:
        """Return the facts of a config's data and networks, which a worker has tried.

        Args:
            config: Config to try; the run's when not given.
            where: Begin of the message of a fault.
            teachers: Networks that may teach, with which further terms of the loss are tried.

        Raises:
            ConfigError: They are not as the config says.
        """
        if self.function is None:
            rows = [
                {"name": model.name, "args": model.args}
                if isinstance(model, ModelConfig)
                else {"checkpoint": str(self.folder.file(model.checkpoint))}
                for model in teachers
            ]
            own: Row = {"teachers": rows} if rows else {}
            checked = self.job("check", config=config, **own)
        else:
            checked = run_one(self.executor, "check_function", function=self.function)
        if "fault" in checked:
            raise ConfigError(f"{where}{checked['fault']}")
        facts = from_row(Facts, checked["facts"])
        for note in facts.notes if config is None else ():  # once a run
            self.events(Message(note))
        return replace(facts, notes=())

    def job(
        self,
        kind: str,
        config: Config | None = None,
        *,
        beside: Sequence[Beside] = (),
        **payload: Any,
    ) -> Row:
        """Run a single job, perhaps beside others; return its last row."""
        tree = to_tree(config or self.config)
        return run_one(self.executor, kind, beside=beside, config=tree, **payload)

    def jobs(
        self,
        title: str,
        kind: str,
        payloads: Sequence[Row],
        *,
        config: Config | None = None,
        beside: Sequence[Beside] = (),
    ) -> list[Row]:
        """Run jobs side by side, once more those that fail; return the last row of each.

        Raises:
            RunError: A job failed again.
        """
        settings = {"config": to_tree(config or self.config)}
        jobs = [Job(kind, settings | payload) for payload in payloads]
        self.events(TaskStarted(title, len(jobs) + len(beside)))

        def progressed(row: Row) -> None:
            self.events(TaskProgressed(row.get("state")))

        try:
            return run_all(self.executor, jobs, beside=beside, attempts=ATTEMPTS, done=progressed)
        except FailedJobError as error:
            raise RunError(f"{title} failed: {error}") from None
