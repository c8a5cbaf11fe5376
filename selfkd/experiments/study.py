"""A study: settings side by side, each replicated on the same seeds.

What a search finds is the best of many. What a setting does is seen where nothing else differs: the
seeds, and with them initialisation and order, are the same for all arms, and each difference is
taken seed by seed. An arm may be the teacher of a later one, so whole chains are repeated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from selfkd.analysis.families import Pairs, judge
from selfkd.analysis.statistics import mean_interval, paired_interval, ratio_interval
from selfkd.config import ArmConfig, Config, ContrastConfig, DataConfig, TargetsConfig, WriteConfig
from selfkd.config.tasks import tries_teachers
from selfkd.config.validate import MEMBERS
from selfkd.errors import ConfigError, RunError
from selfkd.experiments.arms import Arm, Request, Run
from selfkd.experiments.members import make_teachers
from selfkd.experiments.replicas import confirm_seeds
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.teacher_row import keep_teacher
from selfkd.experiments.teachers import check_right, prepare_teachers, sum_written
from selfkd.results import (
    ArmResult,
    ArmRun,
    ContrastResult,
    Facts,
    Interval,
    MembersRow,
    Model,
    StudySummary,
    TrialResult,
    Unseen,
    Written,
)


def compare_arms(run: Run) -> StudySummary:
    """Train and measure the arms of a study; what is done is kept.

    Returns:
        The summary, which is saved as `summary.json`.

    Raises:
        ConfigError: The data, the models or the members are not as the config says.
        RunError: All trials of an arm failed.
    """
    return _Study(run).finish()


def finished(config: Config, folder: RunFolder) -> StudySummary | None:
    """Return the summary of a run that has nothing left to do, else None."""
    summary = folder.summary(StudySummary)
    return summary if summary and summary.seeds >= config.confirm.seeds else None


_Prepared = tuple[str, DataConfig, str, TargetsConfig, WriteConfig]
"""What is prepared of a teacher: its hash, and the settings that decide it."""


class _Study:
    """The arms of a study as they are trained."""

    def __init__(self, run: Run) -> None:
        self.run, self.configs = run, run.config.study.arms
        self.arms: dict[str, Arm] = {}
        self.trials: dict[str, list[TrialResult]] = {}
        self._written = dict[str, Written]()
        self._prepared = dict[_Prepared, Written | None]()

    def finish(self) -> StudySummary:
        run, config = self.run, self.run.config
        facts = {
            name: self._check(name, arm, [m for m in arm.teachers if m != MEMBERS])
            for name, arm in self.configs.items()
            if not arm.average
        }
        if any(MEMBERS in arm.teachers for arm in self.configs.values()):
            self.members = make_teachers(run).of(config)
            for name, arm in self.configs.items():
                if MEMBERS in arm.teachers and tries_teachers(config.at(arm.set)):
                    where = f"study.arms.{name}: "
                    run.check(config.at(arm.set), where=where, teachers=self.members)
        else:
            self.members = []
            run.folder.keep(config, run.check())
        self._check_test(facts)
        for name, own in facts.items():
            run.folder.keep_facts(f"arms/{name}/data.json", own, where=f"study.arms.{name}: ")
        for names in self._waves():
            self._train(names, facts)
        self._keep_teacher()
        summary = self._summary({name: self._measure(name) for name in self.configs})
        return run.finish(summary)

    def _check_test(self, facts: Mapping[str, Facts]) -> None:
        """Check that all arms are tested on the same items.

        Raises:
            ConfigError: The transfer set of one, or its training items, are taken from what another
                is tested on.
        """
        sets = {name: self.run.config.at(self.configs[name].set).data.transfer for name in facts}
        first, *others = facts
        for name in others:
            where = f"study.arms.{name}: must be tested on the items of {first}"
            tested = [facts[each].fingerprints.get("test") for each in (first, name)]
            if sets[name] != sets[first] and tested[0] != tested[1]:
                raise ConfigError(
                    f"{where}, and its transfer set makes the test split another: give "
                    "data.transfer to the whole study, and switch it off by data.transfer.weight: 0"
                )
            counts = [facts[each].items.get("test", 0) for each in (first, name)]
            if counts[0] != counts[1]:
                raise ConfigError(
                    f"{where}, got {counts[1]:,} and {counts[0]:,}: data.train_size takes items "
                    "of the test split where more are asked for than there are for training"
                )

    def _check(self, name: str, arm: ArmConfig, teachers: Sequence[str]) -> Facts:
        """Try an arm on its data, with the networks of arms that teach it."""
        config = self.run.config
        models = [config.at(self.configs[each].set).model for each in teachers]
        return self.run.check(config.at(arm.set), where=f"study.arms.{name}: ", teachers=models)

    def _keep_teacher(self) -> None:
        """Save what the first teacher knows beside the labels, of the first seed."""
        own = self.run.config
        name = next(
            (
                name
                for name, arm in self.configs.items()
                if arm.teachers and own.at(arm.set).reads_cache
            ),
            None,
        )
        if name is not None:
            arm = self.configs[name]
            keep_teacher(
                self.run,
                self._teachers(arm, 0),
                config=self.run.config.at(arm.set),
                teacher=" and ".join(arm.teachers),
                students=f"arm {name}",
            )

    def _waves(self) -> list[list[str]]:
        """Return the arms that can be trained side by side, one lot after the other."""
        depth: dict[str, int] = {}
        for name, arm in self.configs.items():
            if not arm.average:
                depth[name] = 1 + max((depth.get(t, 0) for t in arm.teachers), default=0)
        lots = sorted(set(depth.values()))
        return [[name for name in depth if depth[name] == lot] for lot in lots]

    def _train(self, names: Sequence[str], facts: Mapping[str, Facts]) -> None:
        """Train arms side by side."""
        run = self.run
        for name in names:
            arm, own = self.configs[name], run.config.at(self.configs[name].set)
            seeds = confirm_seeds(run.config, run.config.arm_seeds(arm))
            teachers = [self._teachers(arm, number) for number in range(len(seeds))]
            options = {} if arm.target_transform == "none" else {"transform": arm.target_transform}
            self.arms[name] = Arm(
                name=name,
                folder=run.folder.path / "arms" / name,
                point=arm.set,
                teachers=lambda config, number, teachers=teachers: teachers[number],  # type: ignore[misc]
                network=lambda config, number: config.model,
                options=lambda number, options=options: options,  # type: ignore[misc]
                seeds=seeds,
            )
            if own.reads_cache and run.function is None:
                self._prepare(name, own, teachers, facts[name])
        side = "one arm" if len(names) == 1 else f"{len(names)} arms side by side"
        title = f"{', '.join(names)}: {side}"
        found = run.replicate([self.arms[name] for name in names], title=title)
        self.trials |= dict(zip(names, found, strict=True))

    def _prepare(
        self, name: str, own: Config, teachers: Sequence[Sequence[Model]], facts: Facts
    ) -> None:
        """Prepare what the students of an arm need of their teachers, unless another arm has."""
        write = replace(own.write, keep="all")  # of which those that are right are a part
        models = {
            (model.hash, own.data, own.distill.mode, own.targets, write): model
            for each in teachers
            for model in each
        }
        waiting = {key: model for key, model in models.items() if key not in self._prepared}
        if waiting:
            found = prepare_teachers(
                self.run, list(waiting.values()), of=name, config=own, facts=facts
            )
            self._prepared |= {key: found.get(key[0]) for key in waiting}
        written = [row for key in models if (row := self._prepared[key]) is not None]
        if written:
            self._written[name] = sum_written(written)
            check_right(self._written[name], list(models.values()), of=name, config=own)

    def _teachers(self, arm: ArmConfig, number: int) -> list[Model]:
        """Return the teachers of the trial of a seed."""
        found: list[Model] = []
        for name in arm.teachers:
            if name == MEMBERS:
                found += self.members
                continue
            trials = self._of_seed(name, number)
            if not trials:
                raise ConfigError(f"the trial of {name} that is to teach seed {number} has failed")
            found.append(self.arms[name].model(self.run, trials[0]))
        return found

    def _of_seed(self, name: str, number: int) -> list[TrialResult]:
        """Return an arm's trial of a seed, or that of its only seed; none if it failed."""
        alone = self.run.config.arm_seeds(self.configs[name]) == 1
        return [trial for trial in self.trials[name] if alone or trial.trial == number]

    def _measure(self, name: str) -> list[ArmRun]:
        """Evaluate each student of an arm, or each average of students, on the test split once."""
        run, config = self.run, self.run.config
        if self.configs[name].average:
            return self._averages(name)
        if run.function is not None:
            return [_reported(trial) for trial in self.trials[name]]
        arm, own = self.arms[name], config.at(self.configs[name].set)
        models = [arm.model(run, trial) for trial in self.trials[name]]
        requests = [
            Request(model, arm.teachers(own, trial.trial), config=own)
            for model, trial in zip(models, self.trials[name], strict=True)
        ]
        found = run.evaluate(requests, title=f"testing {name}") if requests else []
        return [
            ArmRun(
                number=trial.trial,
                seed=trial.seed,
                hash=trial.hash,
                parameters=evaluation.parameters,
                train_seconds=trial.train_seconds,
                checkpoint=model.checkpoint,
                unseen=evaluation.unseen,
                metrics=evaluation.metrics,
            )
            for trial, model, evaluation in zip(self.trials[name], models, found, strict=True)
        ]

    def _averages(self, name: str) -> list[ArmRun]:
        """Evaluate the ensemble of arms, seed by seed."""
        run, arm = self.run, self.configs[name]
        found, ensembles = [], []
        for number, seed in enumerate(confirm_seeds(run.config, run.config.arm_seeds(arm))):
            trials = [(other, t) for other in arm.average for t in self._of_seed(other, number)]
            if len(trials) == len(arm.average):
                found.append((number, seed))
                models = [self.arms[other].model(run, trial) for other, trial in trials]
                ensembles.append((models, "probabilities"))
        if not found:
            arms = " and ".join(arm.average)
            raise RunError(f"{arms} have no seed on which all were trained, so no average")
        return [
            ArmRun(number=number, seed=seed, metrics=row.metrics)
            for (number, seed), row in zip(found, run.average(ensembles), strict=True)
        ]

    # --- the summary ---

    def _summary(self, measured: Mapping[str, Sequence[ArmRun]]) -> StudySummary:
        run, config = self.run, self.run.config
        items, metric = run.folder.facts.count("test"), run.metric
        rows = {
            name: replace(_arm_result(name, runs, metric), written=self._written.get(name))
            for name, runs in measured.items()
        }
        members, reference = None, {name: row.runs for name, row in rows.items()}
        if self.members:
            run.evaluate([Request(m) for m in self.members], title="testing the members")
            (row,) = run.average([(self.members, config.distill.average)])
            (cost,) = run.time([self.members])
            members = MembersRow(count=len(self.members), metrics=row.metrics, **cost)
            reference[MEMBERS] = (ArmRun(number=0, seed=0, metrics=members.metrics),)
        first, *others = config.study.arms
        contrasts = config.study.compare or [ContrastConfig(arm=name, to=first) for name in others]
        family = [_pairs(each, reference, metric) for each in contrasts]
        return StudySummary(
            items=items,
            seeds=config.confirm.seeds,
            arms=tuple(rows.values()),
            contrasts=tuple(self._contrast(each, reference, metric) for each in contrasts),
            verdict=judge(family, terms=run.terms) if family else None,
            members=members,
            metric=None if run.function is None else metric,
        )

    def _contrast(
        self, contrast: ContrastConfig, runs: Mapping[str, Sequence[ArmRun]], metric: str
    ) -> ContrastResult:
        """Return the paired difference of two arms, and the fraction of a gap that it closes."""
        names: Any = vars(contrast)
        arm, other = runs[contrast.arm], runs[contrast.to]
        pairs = [(a, b) for a in arm for b in other if a.number == b.number]
        if not pairs:
            return ContrastResult(**names)
        values, others = (
            [row.metrics[metric] for row in side] for side in zip(*pairs, strict=True)
        )
        difference = paired_interval(values, others, floor=self.run.terms.floor)
        share = None
        if contrast.reference:
            ends = runs[contrast.reference]
            alone = contrast.reference == MEMBERS or len(ends) == 1
            sign = 1 if self.run.mode == "max" else -1
            gaps = [
                tuple(sign * (each.metrics[metric] - b.metrics[metric]) for each in (a, end))
                for a, b in pairs
                for end in ends
                if alone or end.number == a.number
            ]
            share = ratio_interval(*zip(*gaps, strict=True)) if gaps else None
        return ContrastResult(**names, difference=difference, share=share)


def _reported(trial: TrialResult) -> ArmRun:
    """Return a seed of an arm as a user's training function has reported it."""
    return ArmRun(
        number=trial.trial,
        seed=trial.seed,
        hash=trial.hash,
        train_seconds=trial.train_seconds,
        metrics=trial.metrics,
    )


def _pairs(contrast: ContrastConfig, runs: Mapping[str, Sequence[ArmRun]], metric: str) -> Pairs:
    values, others = (
        {run.number: run.metrics[metric] for run in runs[name]}
        for name in (contrast.arm, contrast.to)
    )
    return Pairs.of(contrast.arm, contrast.to, values, others)


def _arm_result(name: str, runs: Sequence[ArmRun], metric: str) -> ArmResult:
    def mean(values: Sequence[float | None]) -> Interval | None:
        known = [value for value in values if value is not None]
        return mean_interval(known) if known else None

    unseen = [run.unseen for run in runs if run.unseen is not None and run.unseen.classes]
    names = [key for key in runs[0].metrics if key.startswith("val_")]
    return ArmResult(
        name=name,
        runs=tuple(runs),
        mean=mean_interval([run.metrics[metric] for run in runs]),
        errors=mean([run.metric("test_errors") for run in runs]),
        metrics={key: sum(run.metrics[key] for run in runs) / len(runs) for key in names},
        agreement=mean([run.metric("agreement") for run in runs]),
        unseen_accuracy=mean([_on_unseen(row, row.class_accuracy) for row in unseen]),
        biased_unseen_accuracy=mean([_on_unseen(row, row.biased_class_accuracy) for row in unseen]),
        biased_errors=mean([row.metric("test_errors") for row in unseen]),
        all_biased_errors=mean(
            [row.all_biased.metric("test_errors") for row in unseen if row.all_biased]
        ),
    )


def _on_unseen(unseen: Unseen, accuracy: Sequence[float | None]) -> float | None:
    """Mean of the accuracies of the unseen classes, those of which the test split has an image."""
    known = [
        value
        for label, value in enumerate(accuracy)
        if label in unseen.classes and value is not None
    ]
    return sum(known) / len(known) if known else None
