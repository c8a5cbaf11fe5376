"""Confirmation on fresh seeds: what is trained again, paired, kept, said, and when it stops."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import Recorder, StopAfter, make_run, without_clock
from scipy import stats

from selfkd.cli.tables import summary_table
from selfkd.config import Config, load_config, to_tree
from selfkd.errors import ConfigError, RunError
from selfkd.experiments.arms import Arm, confirm_seeds
from selfkd.experiments.confirm import load_confirmations, stop_reason
from selfkd.experiments.generations import born_again, finished
from selfkd.experiments.run_folder import RunFolder
from selfkd.reporting.plain import headline
from selfkd.results import (
    Confirmation,
    GenerationsSummary,
    Interval,
    McNemar,
    Model,
    Row,
    TrialResult,
)
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.rows import load_row
from selfkd.worker.jobs import run_job

TINY = [
    "model={name: selfkd_mlp, args: {width: 16, depth: 1}}",
    "train.epochs=2",
    "search.trials=2",
    "rounds=2",
]


class Fake:
    """Does jobs without training.

    Args:
        gains: true accuracy of each generation's setting, over that of generation 0.
        fail: stages and trials that fail.
    """

    def __init__(
        self, gains: Sequence[float] = (), *, fail: Sequence[tuple[str, int]] = ()
    ) -> None:
        self.gains, self.fail = gains, fail
        self.jobs: list[tuple[str, Mapping[str, Any]]] = []

    def __call__(self, kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
        self.jobs.append((kind, payload))
        if kind == "check":
            yield {"facts": {"items": {"train": 200}, "views": 1}}
        elif kind == "train":
            yield from self._train(Path(payload["student"]), payload["stage"], payload["seed"])
        elif kind == "cache_teacher_logits":
            yield {"state": "written"}
        elif kind == "evaluate":
            value, digest = Path(payload["student"]).read_text().split()
            row: Row = {"hash": digest, "test_accuracy": float(value) - 0.01}
            row |= {"test_nll": 1.0, "test_ece": 0.1}
            if payload.get("teachers"):
                row["mcnemar"] = {"only_student": 3, "only_teacher": 1, "p": 0.625}
            yield row
        elif kind == "average":
            yield {"rows": [{"hash": "all", "test_accuracy": 0.9}]}

    def _train(self, student: Path, stage: str, seed: int) -> Iterator[Row]:
        number = int(student.parent.name[-3:])
        if (stage, number) in self.fail:
            raise ValueError("loss must be finite")
        generation = int(stage.partition("-")[2] or 0)
        rng = np.random.default_rng([seed, generation])
        gain = self.gains[generation] if generation < len(self.gains) else 0.0
        value = 0.9 + gain + rng.normal(0, 1e-3)
        student.parent.mkdir(parents=True, exist_ok=True)
        student.write_text(f"{value!r} {stage}-{number}")
        row = {"val_accuracy": value, "val_nll": 1.0, "seconds": 1.0}
        yield {"epoch": 1, **row, "hash": f"{stage}-{number}"}

    def kinds(self, kind: str) -> list[Mapping[str, Any]]:
        return [payload for name, payload in self.jobs if name == kind]

    def confirming(self) -> list[Mapping[str, Any]]:
        return [job for job in self.kinds("train") if job["stage"].startswith("confirm")]


def start(folder: Path, *settings: str) -> tuple[Config, RunFolder]:
    config = load_config(settings=[*TINY, *settings])
    return config, RunFolder.create(folder / "run", config)


def config_of(*settings: str) -> Config:
    return load_config(settings=[*TINY, *settings])


def whole(
    config: Config, folder: RunFolder, do: Any, events: Recorder | None = None, **options: Any
) -> GenerationsSummary:
    return born_again(make_run(config, folder, do, events, **options))


def test_every_generation_is_trained_again_on_the_same_fresh_seeds(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "confirm.seeds=3")
    fake, ear = Fake(), Recorder()
    summary = whole(config, folder, fake, ear)
    assert ("confirmation on fresh seeds", 9, 0) in ear.stages  # side by side
    searched = [job for job in fake.kinds("train") if job not in fake.confirming()]
    by_generation = [
        [job for job in fake.confirming() if job["stage"] == f"confirm-{g}"] for g in range(3)
    ]
    seeds = [[job["seed"] for job in jobs] for jobs in by_generation]
    assert seeds[0] == seeds[1] == seeds[2] == confirm_seeds(config)
    assert not {job["seed"] for job in searched} & set(seeds[0])
    for generation, jobs in enumerate(by_generation):
        result = folder.results()[generation]
        assert all(job["config"]["distill"] == vars_of(config.at(result.point)) for job in jobs)
        assert {tuple(t["hash"] for t in job["teachers"]) for job in jobs} == {
            tuple(teacher.hash for teacher in result.teachers)
        }
        where = folder.generation(generation) / "confirm"
        assert sorted(path.name for path in where.iterdir()) == [f"trial_00{n}" for n in range(3)]
    assert [row.generation for row in summary.confirmations] == [0, 1, 2]
    assert ear.confirmed == [0, 1, 2]
    assert not list(folder.path.rglob("confirm/*/student.safetensors"))


def vars_of(config: Config) -> dict[str, Any]:
    distill: dict[str, Any] = to_tree(config)["distill"]
    return distill


def test_means_and_paired_differences_are_scipys(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "confirm.seeds=4")
    summary = whole(config, folder, Fake([0, 0.01, 0.01]))
    paths = [folder.generation(g) / "confirmation.json" for g in range(3)]
    rows = [load_row(Confirmation, path) for path in paths]
    for row in rows:
        expected = stats.ttest_1samp(row.values, 0).confidence_interval()
        assert row.mean.low == pytest.approx(expected.low)
        assert row.seeds == tuple(confirm_seeds(config))
        assert row.metric == "test_accuracy"
        assert np.subtract(row.validation, row.values) == pytest.approx(0.01)
    assert (rows[0].first, rows[0].previous, rows[0].mcnemar) == (None, None, None)
    assert rows[1].first == rows[1].previous
    for found, other in ((rows[2].first, 0), (rows[2].previous, 1)):
        expected = stats.ttest_rel(rows[2].values, rows[other].values).confidence_interval()
        assert found is not None
        assert (found.low, found.high) == pytest.approx((expected.low, expected.high))
    assert rows[2].mcnemar == McNemar(only_student=3, only_teacher=1, p=0.625)
    verdict = summary.verdict
    assert verdict is not None
    assert verdict.seeds == 4
    of_two = np.mean([rows[1].values, rows[2].values], axis=0)
    expected = stats.ttest_rel(of_two, rows[0].values)
    ends = expected.confidence_interval()
    found = verdict.difference
    assert found is not None
    assert (found.low, found.high) == pytest.approx((ends.low, ends.high))
    assert verdict.p == pytest.approx(expected.pvalue)
    assert verdict.sentences[0].startswith(
        "born-again generations 1 and 2, taken together, are better than generation 0: +"
    )
    assert verdict.sentences[0].endswith(" over 4 fresh seeds")
    assert verdict.sentences[1] == (
        "each of generations 1 and 2 is by itself better than generation 0, corrected for all "
        "3 sets of generations (closed test)"
    )


def test_each_model_is_tested_once(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "confirm.seeds=2")
    fake = Fake()
    whole(config, folder, fake)
    tested = [job["student"] for job in fake.kinds("evaluate")]
    assert len(tested) == len(set(tested)) == 3 + 3 * 2
    whole(config, folder, again := Fake())
    assert again.kinds("evaluate") == []
    assert again.kinds("train") == []


def test_one_seed_has_no_interval_and_says_so(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "confirm.seeds=1", "rounds=1")
    summary = whole(config, folder, Fake([0, 0.05]))
    first, second = summary.confirmations
    assert first.mean.low is None
    assert second.first is not None
    assert second.first.low is None
    assert summary.verdict is not None
    (only,) = summary.verdict.sentences
    assert only.startswith("generation 1 and generation 0 differ by +4.99 points")
    assert only.endswith(" points over 1 fresh seed, too few for an interval")


def test_without_seeds_nothing_is_confirmed(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "confirm.seeds=0")
    fake = Fake()
    summary = whole(config, folder, fake)
    assert fake.confirming() == []
    assert summary.confirmations == ()
    assert summary.verdict is None
    assert finished(config, folder) == summary


def test_a_failed_trial_leaves_its_pair_out(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "confirm.seeds=3", "rounds=1")
    ear = Recorder()
    summary = whole(config, folder, Fake(fail=[("confirm-0", 1)]), ear)
    first, second = summary.confirmations
    seeds = confirm_seeds(config)
    assert first.seeds == (seeds[0], seeds[2])
    assert second.seeds == tuple(seeds)
    expected = np.mean([second.values[0], second.values[2]])
    assert second.first is not None
    assert second.first.value == pytest.approx(expected - np.mean(first.values))
    assert summary.verdict is not None
    assert summary.verdict.seeds == 2
    assert ear.notes == ["1 of the 6 trials of the confirmation on fresh seeds failed"]


@pytest.mark.parametrize("rounds", ["rounds=2", "rounds=auto"])
def test_more_seeds_train_only_those_that_are_missing(tmp_path: Path, rounds: str) -> None:
    student = "student={name: selfkd_mlp, args: {width: 8, depth: 1}}"
    settings = [rounds, "rounds_max=2", student]
    config, folder = start(tmp_path / "few", *settings, "confirm.seeds=3")
    few = whole(config, folder, Fake())
    more = load_config(settings=[*TINY, *settings, "confirm.seeds=5"])
    folder.check_change(config, more)
    assert finished(more, folder) is None
    again = Fake()
    found = whole(more, folder, again)
    assert len(again.kinds("train")) == len(again.confirming()) == 4 * 2
    assert len(again.kinds("cache_teacher_logits")) == 2, "they may have been removed since"
    assert [kind for kind, _ in again.jobs].index("cache_teacher_logits") == 1  # after the check
    assert {Path(job["student"]).parent.name for job in again.confirming()} == {
        "trial_003",
        "trial_004",
    }
    assert len(again.kinds("evaluate")) == 4 * 2
    config, other = start(tmp_path / "many", *settings, "confirm.seeds=5")
    many = whole(config, other, Fake())
    assert (found.confirmations, found.verdict, found.controls) == (
        many.confirmations,
        many.verdict,
        many.controls,
    )
    assert found.confirmations[0].values[:3] == few.confirmations[0].values
    assert finished(more, folder) == found
    with pytest.raises(ConfigError, match="must be at least the 5 of the run, got 3"):
        folder.check_change(more, config_of(*settings, "confirm.seeds=3"))


@pytest.mark.parametrize("jobs", [1, 5, 8, 12, 13])
def test_more_seeds_may_be_interrupted(tmp_path: Path, jobs: int) -> None:
    config, folder = start(tmp_path / "few", "confirm.seeds=3")
    whole(config, folder, Fake())
    more = config_of("confirm.seeds=5")
    with pytest.raises(KeyboardInterrupt):
        whole(more, folder, StopAfter(Fake(), jobs))
    found = whole(more, folder, Fake())
    many = whole(*start(tmp_path / "many", "confirm.seeds=5"), Fake())
    assert (found.confirmations, found.verdict) == (many.confirmations, many.verdict)


def test_when_all_of_an_arm_fail_it_is_an_error_that_can_be_resumed(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "confirm.seeds=2", "rounds=1")
    fail = [("confirm-1", 0), ("confirm-1", 1)]
    with pytest.raises(RunError, match=r"2 trials of confirm 1 failed; the first: .*finite"):
        whole(config, folder, Fake(fail=fail))
    assert finished(config, folder) is None
    whole(config, folder, again := Fake())
    assert [job["stage"] for job in again.kinds("train")] == ["confirm-1"] * 2


@pytest.mark.parametrize("rounds", ["rounds=2", "rounds=auto"])
@pytest.mark.parametrize("jobs", [10, 13, 15, 18, 20, 21])
def test_resumed_equals_undisturbed(tmp_path: Path, jobs: int, rounds: str) -> None:
    settings = [rounds, "confirm.seeds=3"]
    config, undisturbed = start(tmp_path / "whole", *settings)
    expected = whole(config, undisturbed, Fake())
    config, folder = start(tmp_path / "stopped", *settings)
    first, again = Fake(), Fake()
    stopping = StopAfter(first, jobs)
    with pytest.raises(KeyboardInterrupt):
        whole(config, folder, stopping)
    assert finished(config, folder) is None
    folder, config = RunFolder.open(folder.path)
    found = whole(config, folder, again)
    expected, found = (
        replace(summary, generations=tuple(map(without_clock, summary.generations)))
        for summary in (expected, found)
    )
    assert found == expected
    assert len(first.kinds("train")) + len(again.kinds("train")) == 3 * 2 + 3 * 3


def test_it_stops_when_two_generations_in_a_row_gain_nothing(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "rounds=auto", "rounds_max=9", "confirm.seeds=3", "seed=1")
    ear = Recorder()
    summary = whole(config, folder, Fake([0, 0.02, 0.02, 0.06, 0.06, 0.06]), ear)
    assert ear.chosen == ear.confirmed == [0, 1, 2, 3, 4, 5]
    assert (summary.stopped or "").startswith(
        "stopped after generation 5: generations 4 and 5, taken together, show no evidence of a "
        "gain over generation 3 (val_accuracy, 3 paired seeds: "
    )
    assert finished(config, folder) == summary


def test_it_stops_at_the_most_rounds(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "rounds=auto", "rounds_max=3", "confirm.seeds=3")
    summary = whole(config, folder, Fake([0, 0.02, 0.04, 0.06, 0.08]))
    assert len(summary.generations) == 4
    assert summary.stopped is None
    assert finished(config, folder) == summary


def test_a_loss_is_no_gain(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "rounds=auto", "confirm.seeds=3")
    summary = whole(config, folder, Fake([0, -0.02, -0.04, 0, 0]))
    assert len(summary.generations) == 3


def test_what_stopped_by_itself_can_be_sent_on(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "rounds=auto", "confirm.seeds=3")
    assert len(whole(config, folder, Fake()).generations) == 3
    more = load_config(settings=[*TINY, "rounds=4", "confirm.seeds=3"])
    folder.check_change(config, more)
    assert finished(more, folder) is None
    summary = whole(more, folder, Fake())
    assert len(summary.generations) == 5
    assert summary.stopped is None


def test_the_choice_to_stop_sees_validation_only() -> None:
    def row(validation: list[float], test: list[float]) -> Confirmation:
        return Confirmation(
            generation=0,
            seeds=(1, 2, 3),
            metric="test_accuracy",
            validation=tuple(validation),
            values=tuple(test),
            mean=Interval(0.9),
        )

    config = load_config(settings=["rounds=auto"])
    flat, better = [0.9, 0.91, 0.9], [0.95, 0.96, 0.951]
    on_test = [row(flat, flat), row([0.901, 0.908, 0.9], better), row(flat, better)]
    assert stop_reason(config, on_test) is not None
    assert stop_reason(config, on_test[:2]) is None
    on_validation = [row(flat, flat), row(better, flat), row(better[::-1], flat)]
    assert stop_reason(config, on_validation) is None
    least = load_config(settings=["rounds=auto", "search.mode=min", "search.metric=loss"])
    assert stop_reason(least, on_validation) is not None


def test_a_student_of_another_size_is_compared_with_itself_on_labels(tmp_path: Path) -> None:
    config, folder = start(
        tmp_path, "confirm.seeds=2", "student={name: selfkd_mlp, args: {width: 8, depth: 1}}"
    )
    fake = Fake([0, 0.01, 0.02])
    summary = whole(config, folder, fake)
    widths = {job["stage"]: job["model"]["args"]["width"] for job in fake.confirming()}
    assert widths == {"confirm-0": 16, "confirm-1": 8, "confirm-2": 8, "confirm_labels": 8}
    (row,) = summary.controls
    assert row.title == "selfkd_mlp, labels only"
    second = summary.confirmations[1]
    assert second.first is not None
    assert second.first.value == pytest.approx(np.subtract(second.values, row.values).mean())
    assert summary.verdict is not None
    assert summary.verdict.to == "the same network from labels only"
    whole(config, folder, again := Fake())
    assert again.kinds("train") == []


@pytest.mark.parametrize("student", [(), ("student={name: selfkd_mlp, args: {width: 8}}",)])
def test_without_a_baseline_the_later_generations_alone_are_replicated(
    tmp_path: Path, student: Sequence[str]
) -> None:
    settings = ["confirm.seeds=3", *student]
    config, folder = start(tmp_path, *settings, "confirm.baseline=false")
    fake, gains = Fake([0, 0.01, 0.02]), [0, 0.01, 0.02]
    summary = whole(config, folder, fake)
    assert {job["stage"] for job in fake.confirming()} == {"confirm-1", "confirm-2"}
    assert [row.generation for row in summary.confirmations] == [1, 2]
    assert [row.first for row in summary.confirmations] == [None, None]
    assert summary.confirmations[1].previous is not None
    assert summary.verdict is None
    assert summary.controls == ()
    assert headline(summary).startswith("not compared with labels only")
    measured = [row[1] for row in summary_table(summary, "accuracy").rows]
    assert [text.endswith("(one model)") for text in measured[:3]] == [True, False, False]
    assert finished(config, folder) == summary
    with_it = config_of(*settings)
    assert finished(with_it, folder) is None
    with pytest.raises(KeyboardInterrupt):  # before anything but the baseline
        whole(with_it, folder, StopAfter(Fake(gains), 3))
    found = whole(with_it, folder, later := Fake(gains))
    assert {job["stage"] for job in later.kinds("train")} <= {"confirm-0", "confirm_labels"}
    undisturbed = whole(*start(tmp_path / "whole", *settings), Fake(gains))
    assert (found.confirmations, found.verdict, found.controls) == (
        undisturbed.confirmations,
        undisturbed.verdict,
        undisturbed.controls,
    )
    with pytest.raises(ConfigError, match=r"confirm\.baseline must stay true"):
        folder.check_change(with_it, config)


def test_a_function_of_the_user_s_is_confirmed_by_its_metric(tmp_path: Path) -> None:
    """Less is better, and there is no test split."""
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "def train(trial):\n"
        "    torch.manual_seed(trial.seed)\n"
        "    drawn = float(torch.rand(()))\n"
        "    trial.report({'error': drawn + 5 - trial.generation}, student=torch.nn.Linear(1, 1))\n"
    )
    config, folder = start(
        tmp_path, "search.metric=error", "search.mode=min", "confirm.seeds=3", "rounds=1"
    )
    summary = whole(config, folder, run_job, function=f"{file}:train")
    first, second = summary.confirmations
    assert first.metric == "error"
    assert summary.ensemble is None
    # the same seeds draw the same: all pairs differ by 1, the generation
    assert np.subtract(first.values, second.values) == pytest.approx([1, 1, 1])
    assert second.first is not None
    assert second.first.value == pytest.approx(-1)
    assert second.mcnemar is None
    assert summary.verdict is not None
    assert summary.verdict.sentences == (
        "generation 1 and generation 0 differ by -1 in error, the same on all 3 fresh seeds, so "
        "there is no interval",
    )


def test_real_models_of_a_seed_start_alike_and_are_the_same_run_to_run(tmp_path: Path) -> None:
    """On digits: the labels-only model of a seed has the distilled one's start and order."""
    config, folder = start(tmp_path, "rounds=1", "confirm.seeds=2", "search.trials=1")
    run = make_run(config, folder)
    confirmations = born_again(run).confirmations
    teachers: list[Model] = list(folder.results()[1].teachers)
    unused = {"distill.alpha": 0.0}  # a teacher that is not run
    arms = [
        Arm(name="one", folder=folder.path / "one", point=unused),
        Arm(
            name="two",
            folder=folder.path / "two",
            point=unused,
            teachers=lambda own, number: teachers,
        ),
    ]
    trials = run.replicate(arms)
    assert [len(rows) for rows in trials] == [2, 2]
    for one, two in zip(*trials, strict=True):
        models = arms[0].model(run, one), arms[1].model(run, two)
        weights = [load_tensors(folder.path / model.checkpoint)[0] for model in models]
        assert all(weights[0][name].equal(weights[1][name]) for name in weights[0])
    assert tuple(load_confirmations(config, folder, 2)) == confirmations
    path = folder.generation(0) / "confirm" / "trial_000" / "result.json"
    again, labels = load_row(TrialResult, path), trials[0][0]
    assert labels.hash != again.hash  # the name of the stage is in the file
    assert labels.metrics["val_accuracy"] == again.metrics["val_accuracy"]
    assert all(0 < a <= 1 for row in confirmations for a in row.values)
    assert confirmations[1].mcnemar is not None
    assert confirmations[1].mcnemar.p <= 1
