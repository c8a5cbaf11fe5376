"""Arms side by side, in one process: who teaches whom, what is paired, measured, kept, refused."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import Recorder, make_run, predictions
from scipy import stats

from selfkd.config import Config, load_config
from selfkd.config.validate import check_study
from selfkd.data import load_data
from selfkd.errors import ConfigError, RunError
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.study import compare_arms, finished
from selfkd.results import ArmResult, ArmRun, Row, StudySummary
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.files import load_json
from selfkd.worker.jobs import run_job

RunJob = Callable[[str, Mapping[str, Any]], Iterator[Row]]
MEMBERS = "members from elsewhere were trained on other data"
TINY = [
    "model={name: selfkd_mlp, args: {width: 16, depth: 1}}",
    "train={epochs: 2, batch_size: 20}",
    "confirm.seeds=3",
]
ARMS = """study={
  arms: {
    labels: {},
    born_again: {teacher: labels, set: {distill.temperature: 4, distill.alpha: 1}},
    few: {set: {data.train_size: 50, train.epochs: 1}, seeds: 2},
    one: {seeds: 1, set: {data.jitter: 1, data.views: 2}},
    of_one: {teacher: one},
    of_two: {teacher: [labels, born_again], set: {distill.alpha: 0.5}},
    no_three: {teacher: one, set: {data.classes: [0, 1, 2, 4, 5, 6, 7, 8, 9], distill.alpha: 1}},
    permuted: {teacher: labels, target_transform: permuted},
    both: {average: [labels, born_again]},
  },
  compare: [
    {arm: born_again, to: labels},
    {arm: labels, to: few, reference: both},
  ]}"""


Whole = tuple[RunFolder, StudySummary, Recorder]


def study(path: Path, *settings: str, do: RunJob = run_job, notes: str = MEMBERS) -> Whole:
    config = load_config(settings=[*TINY, *settings])
    check_study(config)
    folder = RunFolder.create(path, config, command="study") if not path.exists() else None
    folder = folder or RunFolder(path)
    ear = Recorder()
    summary = compare_arms(make_run(config, folder, do, ear))
    assert all(notes in note for note in ear.notes)
    return folder, summary, ear


def trained(ear: Recorder) -> int:
    return sum(trials - done for _, trials, done in ear.stages)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    return study(tmp_path_factory.mktemp("runs") / "whole", ARMS)


def trials(folder: RunFolder, arm: str) -> list[Row]:
    return [load_json(path) for path in sorted((folder.path / "arms" / arm).glob("*/result.json"))]


def arm(summary: StudySummary, name: str) -> ArmResult:
    return next(row for row in summary.arms if row.name == name)


def saved(folder: RunFolder, row: ArmRun) -> dict[str, torch.Tensor]:
    """Return the logits of a student."""
    return load_tensors(predictions(folder, row.hash))[0]


def test_arms_share_their_seeds_and_each_is_taught_by_that_of_its_own(
    whole: Whole,
) -> None:
    folder, _, _ = whole
    labels, born_again = trials(folder, "labels"), trials(folder, "born_again")
    assert len(labels) == len({row["seed"] for row in labels}) == 3
    assert [row["seed"] for row in born_again] == [row["seed"] for row in labels]
    assert [row["teachers"] for row in born_again] == [[row["hash"]] for row in labels]
    of_two = [row["teachers"] for row in trials(folder, "of_two")]
    assert of_two == [[a["hash"], b["hash"]] for a, b in zip(labels, born_again, strict=True)]
    (one,) = trials(folder, "one")
    assert [row["teachers"] for row in trials(folder, "of_one")] == [[one["hash"]]] * 3
    assert [row["seed"] for row in trials(folder, "few")] == [row["seed"] for row in labels[:2]]


def test_an_arm_is_trained_as_it_says(whole: Whole) -> None:
    folder, _, ear = whole
    assert [len(row["history"]) for row in trials(folder, "few")] == [1, 1]
    assert "soft_loss" in trials(folder, "born_again")[0]["history"][0]
    assert "soft_loss" not in trials(folder, "labels")[0]["history"][0]
    assert trained(ear) == 21
    # one shard each: three of labels and of born_again, one of one, and one for no_three's images
    assert ear.states.count("written") == 8


def test_accuracies_are_those_of_the_saved_predictions(whole: Whole) -> None:
    folder, summary, _ = whole
    labels = load_data("digits").test.labels
    runs = arm(summary, "labels").runs
    for row in runs:
        wrong = int((saved(folder, row)["test"].argmax(dim=1) != labels).sum())
        assert row.metrics["test_errors"] == wrong
        assert row.metrics["test_accuracy"] == pytest.approx(1 - wrong / len(labels), abs=1e-6)
    values = [row.metrics["test_errors"] for row in runs]
    low, high = stats.t.interval(0.95, 2, np.mean(values), stats.sem(values))
    mean = arm(summary, "labels").errors
    assert mean is not None
    assert (mean.value, mean.low, mean.high) == pytest.approx((np.mean(values), low, high))


def test_an_average_is_the_ensemble_of_the_arms_seed_by_seed(
    whole: Whole,
) -> None:
    folder, summary, _ = whole
    labels = load_data("digits").test.labels
    sides = [arm(summary, name).runs for name in ("labels", "born_again")]
    for number, row in enumerate(arm(summary, "both").runs):
        mean = sum(saved(folder, side[number])["test"].softmax(dim=1) for side in sides)
        assert isinstance(mean, torch.Tensor)
        assert row.metrics["test_errors"] == int((mean.argmax(dim=1) != labels).sum())


def test_differences_are_paired_by_seed(whole: Whole) -> None:
    _, summary, _ = whole
    first, second = summary.contrasts
    values, others = (
        [row.metrics["test_accuracy"] for row in arm(summary, name).runs]
        for name in ("born_again", "labels")
    )
    interval = stats.ttest_rel(values, others).confidence_interval(0.95)
    found = first.difference
    assert found is not None
    assert (found.low, found.high) == pytest.approx((interval.low, interval.high))
    assert summary.verdict is not None
    said = summary.verdict.sentences
    assert len(said) == len(summary.contrasts) + 1
    assert "over 3 fresh seeds" in said[0]
    assert summary.verdict.comparisons[0].difference == found
    few, labels, both = (
        np.mean([row.metrics["test_accuracy"] for row in arm(summary, name).runs[:2]])
        for name in ("few", "labels", "both")
    )
    assert said[1].endswith("over 2 fresh seeds, too few for an interval")
    assert second.share is not None
    assert second.share.value == pytest.approx((labels - few) / (both - few))


def test_a_class_that_was_not_seen_gets_one_bias_from_validation(
    whole: Whole,
) -> None:
    folder, summary, _ = whole
    data = load_data("digits")
    assert not (load_data("digits", classes=[0, 1]).train.labels > 1).any()
    for row in arm(summary, "no_three").runs:
        logits, unseen = saved(folder, row), row.unseen
        assert unseen is not None
        assert unseen.classes == (3,)
        before, after = unseen.class_accuracy[3], unseen.biased_class_accuracy[3]
        assert before is not None
        assert after is not None
        assert (after - before) * unseen.bias >= 0

        def wrong(split: str, bias: float, logits: dict[str, torch.Tensor] = logits) -> int:
            shifted = logits[split].double()
            shifted[:, 3] += bias
            return int((shifted.argmax(dim=1) != getattr(data, split).labels).sum())

        assert unseen.metrics["test_errors"] == wrong("test", unseen.bias)
        found = wrong("val", unseen.bias)
        assert found <= min(wrong("val", bias) for bias in np.linspace(-20, 20, 20_001))
    assert arm(summary, "labels").runs[0].unseen is None
    assert arm(summary, "labels").unseen_accuracy is None
    runs = [row.unseen for row in arm(summary, "no_three").runs if row.unseen]
    for found, name in (
        (arm(summary, "no_three").unseen_accuracy, "class_accuracy"),
        (arm(summary, "no_three").biased_unseen_accuracy, "biased_class_accuracy"),
    ):
        assert found is not None
        assert found.value == pytest.approx(np.mean([getattr(row, name)[3] for row in runs]))


def test_a_second_start_trains_and_tests_nothing_again(
    whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, summary, _ = whole
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("predictions/*")}
    _, again, ear = study(folder.path, ARMS)
    assert trained(ear) == ear.states.count("written") == 0
    assert {path: path.stat().st_mtime_ns for path in folder.path.rglob("predictions/*")} == before
    assert again == summary


def test_an_arm_of_other_data_or_weights_than_at_its_start_is_refused(whole: Whole) -> None:
    def changed(kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
        few = payload["config"]["data"]["train_size"] == 50
        for row in run_job(kind, payload):
            yield {"facts": row["facts"] | {"weights": {"/model": "abc"}}} if few else row

    said = r"study.arms.few: .* was started on other data.*\n  weights: {} -> {'/model': 'abc'}"
    with pytest.raises(ConfigError, match=said):
        study(whole[0].path, ARMS, do=changed)


def test_members_of_another_run_teach(whole: Whole, tmp_path: Path) -> None:
    folder, _, _ = whole
    student = folder.path / "arms" / "labels" / "trial_000" / "student.safetensors"
    member = {"path": str(student), "model": "selfkd_mlp", "args": {"width": 16, "depth": 1}}
    _, summary, _ = study(
        tmp_path / "run",
        f"members.checkpoints=[{member}]",
        "study={arms: {labels: {}, taught: {teacher: members}}, "
        "compare: [{arm: taught, to: labels, reference: members}]}",
    )
    assert summary.members is not None
    assert summary.members.count == 1
    assert summary.contrasts[0].share is not None or summary.members.metrics["test_errors"]
    assert len(arm(summary, "taught").runs) == 3


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ("study={arms: {}}", "study.arms must have at least one arm"),
        ("study={arms: {a: {teacher: b}, b: {}}}", "stand before it (members), got 'b'"),
        ("study={arms: {a: {teacher: members}}}", "members must be given, by --from RUN"),
        (
            "study={arms: {a: {seeds: 2}, b: {teacher: a}}}",
            "a must have 1 seed or at least as many",
        ),
        ("study={arms: {a: {}, b: {average: [a], set: {train.lr: 1}}}}", "must have average alone"),
        (
            "study={arms: {a: {target_transform: permuted}}}",
            "be given with target_transform permuted",
        ),
        ("study={arms: {a: {}, b: {teacher: a, target_transform: virtual}}}", "must not be given"),
        ("study={arms: {a: {set: {data.name: mnist}}}}", "got data.name"),
        ("study={arms: {a: {set: {search.trials: 2}}}}", "got search.trials"),
        ("study={arms: {a: {set: {train.epochs: 0}}}}", "study.arms.a.set: train.epochs: must be"),
        ("study={arms: {a/b: {}}}", "a name must be of letters"),
        ("study={arms: {members: {}}}", "and not members"),
        ("study={arms: {a: {}}, compare: [{arm: a, to: c}]}", "must name arms (a), got 'c'"),
        ("student={name: selfkd_cnn}", "student: not of a study, got selfkd_cnn"),
    ],
)
def test_what_cannot_be_is_refused(settings: str, message: str) -> None:
    config: Config = load_config(settings=[*TINY, settings])
    with pytest.raises(ConfigError) as caught:
        check_study(config)
    assert message in str(caught.value)


def test_an_unknown_key_of_an_arm_is_named() -> None:
    with pytest.raises(ConfigError, match=r"study\.arms\.a\.colour: unknown key"):
        load_config(settings=["study={arms: {a: {colour: red}}}"])


def test_a_class_that_the_data_lacks_is_refused_before_training(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"study\.arms\.a: data\.classes must be in \[0, 9\]"):
        study(tmp_path / "run", "study={arms: {a: {set: {data.classes: [0, 10]}}}}")


def losing(*trials: str) -> RunJob:
    """Return what does jobs, but fails those trials."""

    def lose(kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
        if any(trial in str(payload.get("student")) for trial in trials) and kind == "train":
            raise RuntimeError("out of memory")
        return run_job(kind, payload)

    return lose


def test_arms_that_share_no_seed_are_not_compared(tmp_path: Path) -> None:
    lose = losing("arms/a/trial_000", "arms/b/trial_001", "arms/b/trial_002")
    _, summary, _ = study(
        tmp_path / "run",
        "study={arms: {a: {}, b: {}, c: {}}}",
        do=lose,
        notes="trials of",
    )
    assert [len(row.runs) for row in summary.arms] == [2, 1, 3]
    to_b, to_c = summary.contrasts
    assert (to_b.difference, to_b.share) == (None, None)
    assert to_c.difference is not None
    assert summary.verdict is not None
    said = summary.verdict.sentences
    assert said[0] == "b and a share no fresh seed: nothing to compare"
    assert "over 2 fresh seeds" in said[1]


def test_an_average_without_any_seed_of_all_is_told(tmp_path: Path) -> None:
    lose = losing("arms/a/trial_000", "arms/b/trial_001", "arms/b/trial_002")
    arms = "study={arms: {a: {}, b: {}, both: {average: [a, b]}}}"
    with pytest.raises(RunError, match="a and b have no seed on which all were trained"):
        study(tmp_path / "run", arms, do=lose, notes="trials of")


def test_a_finished_study_takes_more_seeds(tmp_path: Path) -> None:
    arms = "study={arms: {labels: {}, again: {teacher: labels}, both: {average: [labels, again]}}}"
    study(tmp_path / "few", arms, "confirm.seeds=1")
    folder, found, ear = study(tmp_path / "few", arms)
    assert trained(ear) == 4
    _, expected, _ = study(tmp_path / "many", arms)
    runs = [
        [[replace(row, train_seconds=0.0) for row in each.runs] for each in summary.arms]
        for summary in (found, expected)
    ]
    assert runs[0] == runs[1]
    assert found.verdict == expected.verdict
    assert finished(RunFolder.open(folder.path)[1], folder) == found


def test_arms_with_and_without_a_transfer_set(tmp_path: Path) -> None:
    """An arm switches it off, or takes another; what makes the test split another is refused."""
    arms = (
        "study={arms: {labels: {}, plain: {teacher: labels, set: {data.transfer.weight: 0}}, "
        "more: {teacher: labels}, folder: {teacher: labels, set: {data.transfer.size: 200}}}}"
    )
    base = "data={train_size: 60, val_size: 100, transfer: {name: digits, size: 300}}"
    fine = arms.replace("data.transfer.size: 200", "data.transfer.labels: true")
    few = ("confirm.seeds=1", "train.epochs=1")
    _, summary, _ = study(tmp_path / "fine", base, fine, *few, notes="transfer set: 300")
    found = {arm.name: arm.runs[0].hash for arm in summary.arms}
    assert len(set(found.values())) == 4
    with pytest.raises(ConfigError, match=r"study.arms.folder: must be tested on the items of lab"):
        study(tmp_path / "other", base.replace("300", "1000"), arms)


def test_arms_that_are_tested_on_other_items_are_refused(tmp_path: Path) -> None:
    arms = "study={arms: {some: {}, more: {set: {data.train_size: 700}}}}"
    with pytest.raises(ConfigError, match=r"study\.arms\.more: .* got 697 and 1,197: data\.tr"):
        study(tmp_path / "run", "data.train_size=100", arms)


def test_an_arm_that_cannot_start_from_its_teacher_is_refused(tmp_path: Path) -> None:
    small, big = (f"{{name: selfkd_resnet{depth}, args: {{width: 2}}}}" for depth in (8, 20))
    arms = f"""study={{arms: {{
        small: {{set: {{model: {small}}}}},
        deeper: {{set: {{model: {big}, train.init: every_other}}, teacher: small}},
    }}}}"""
    with pytest.raises(
        ConfigError, match=r"study\.arms\.deeper: train\.init must suit the student"
    ):
        study(tmp_path / "run", arms)
    arms = f"""study={{arms: {{
        big: {{set: {{model: {big}, train.epochs: 1}}, seeds: 1}},
        half: {{teacher: big, seeds: 1, set: {{
            model: {small}, train: {{init: {{features.1: features.2}}, epochs: 1, lr: 1e-30}},
        }}}},
    }}}}"""
    folder, _, _ = study(tmp_path / "other", arms, "data.train_size=100", "distill.live=true")
    ours, theirs = (
        load_tensors(folder.path / "arms" / name / "trial_000" / "student.safetensors")[0]
        for name in ("half", "big")
    )
    name = "features.{}.conv1.weight".format
    assert torch.equal(ours[name(1)], theirs[name(2)])
    assert not torch.equal(ours[name(2)], theirs[name(2)])
