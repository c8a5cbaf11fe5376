"""Controls of equal cost: what each is trained on, how it is measured, kept and resumed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from engine import Count, Recorder, make_run, predictions
from scipy.special import softmax
from scipy.stats import ttest_rel

from selfkd.config import Config, load_config, to_tree
from selfkd.experiments.arms import confirm_seeds
from selfkd.experiments.generations import born_again, finished
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import ControlResult, GenerationsSummary, TrialResult
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.rows import load_row
from selfkd.tasks import make_task
from selfkd.worker.jobs import run_job

TINY = [
    "data.train_size=100",
    "model={name: selfkd_mlp, args: {width: 8, depth: 1}}",
    "train.epochs=3",
    "search.trials=3",
    "rounds=1",
    "confirm.seeds=3",
]
ALL = "controls=[seeds, label_smoothing, dkpp, cwtm, teacher_free]"


def whole(
    config: Config, folder: RunFolder, count: Count, events: Recorder | None = None
) -> GenerationsSummary:
    return born_again(make_run(config, folder, count, events))


@pytest.fixture(scope="module")
def done(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Config, RunFolder, GenerationsSummary, Count, Recorder]:
    config = load_config(settings=[*TINY, ALL])
    folder = RunFolder.create(tmp_path_factory.mktemp("controls") / "run", config)
    count, ear = Count(), Recorder()
    return config, folder, whole(config, folder, count, ear), count, ear


def control(summary: GenerationsSummary, name: str) -> ControlResult:
    (row,) = (row for row in summary.controls if row.name == name)
    return row


@pytest.mark.parametrize("name", ["label_smoothing", "dkpp", "cwtm", "teacher_free"])
def test_each_arm_has_as_many_trials_and_the_same_seeds(done: Any, name: str) -> None:
    config, _, summary, count, ear = done
    searched, confirmed = count.trained(f"control_{name}"), count.trained(f"control_{name}_confirm")
    assert len(searched) == len(count.trained("generation-1")) == 3
    assert [job["seed"] for job in confirmed] == confirm_seeds(config)
    assert [job["seed"] for job in count.trained("confirm-1")] == confirm_seeds(config)
    assert ("controls on the same fresh seeds", 12, 0) in ear.stages
    row = control(summary, name)
    first, generation = (confirmation.values for confirmation in summary.confirmations)
    for found, pairs in (
        (row.born_again, (generation, row.values)),
        (row.first, (row.values, first)),
    ):
        assert found is not None
        assert found.value == pytest.approx(np.subtract(*pairs).mean())
        if found.low is not None:
            expected = ttest_rel(*pairs).confidence_interval()
            assert found.low == pytest.approx(expected.low)
    assert row.wanted == 3


def test_the_strength_of_label_smoothing_is_searched_without_a_teacher(done: Any) -> None:
    _, _, summary, count, _ = done
    jobs = count.trained("control_label_smoothing")
    strengths = [job["config"]["train"]["label_smoothing"] for job in jobs]
    assert len(set(strengths)) == 3
    assert all(0 <= strength <= 0.5 for strength in strengths)
    assert all(job["teachers"] == [] and "transform" not in job for job in jobs)
    chosen = control(summary, "label_smoothing").point["train.label_smoothing"]
    assert chosen in strengths
    confirmed = count.trained("control_label_smoothing_confirm")
    assert {job["config"]["train"]["label_smoothing"] for job in confirmed} == {chosen}


def test_permuted_logits_are_of_the_teacher_of_generation_1(done: Any) -> None:
    _, _, _, count, _ = done
    jobs = [*count.trained("control_dkpp"), *count.trained("control_dkpp_confirm")]
    assert {job["transform"] for job in jobs} == {"permuted"}
    (first, *_) = count.trained("generation-1")
    assert all(job["teachers"] == first["teachers"] for job in jobs)
    assert len({job["config"]["distill"]["temperature"] for job in jobs[:3]}) == 3


def test_confidence_weights_have_that_teacher_and_search_neither_t_nor_alpha(done: Any) -> None:
    config, _, summary, count, _ = done
    jobs = [*count.trained("control_cwtm"), *count.trained("control_cwtm_confirm")]
    assert {job["transform"] for job in jobs} == {"confidence"}
    (first, *_) = count.trained("generation-1")
    assert all(job["teachers"] == first["teachers"] for job in jobs)
    assert all(job["config"] == to_tree(config) for job in jobs)
    assert control(summary, "cwtm").point == {}


def test_of_the_arg_max_alpha_alone_is_searched(tmp_path: Path) -> None:
    points = "search.points=[{distill.alpha: 0.9, distill.temperature: 2}, {distill.alpha: 0.9}]"
    more = ["controls=[hard, class_mean]", "confirm.seeds=1", points]
    config, count = load_config(settings=[*TINY, *more]), Count()
    summary = whole(config, RunFolder.create(tmp_path / "run", config), count)
    (first, *_) = count.trained("generation-1")
    for name, temperatures in (("hard", 1), ("class_mean", 3)):
        jobs = [*count.trained(f"control_{name}"), *count.trained(f"control_{name}_confirm")]
        assert {job["transform"] for job in jobs} == {name}
        assert all(job["teachers"] == first["teachers"] for job in jobs)
        distill = [job["config"]["distill"] for job in jobs[:3]]
        assert distill[0]["alpha"] == 0.9
        assert len({row["temperature"] for row in distill}) == temperatures
        assert ("distill.temperature" in control(summary, name).point) == (name != "hard")
    assert len({job["config"]["distill"]["alpha"] for job in count.trained("control_hard")}) == 3


def test_teacher_free_has_no_teacher(done: Any) -> None:
    _, _, _, count, _ = done
    jobs = [*count.trained("control_teacher_free"), *count.trained("control_teacher_free_confirm")]
    assert all(job["transform"] == "virtual" and job["teachers"] == [] for job in jobs)
    assert len({job["config"]["distill"]["alpha"] for job in jobs[:3]}) == 3


def test_controls_are_trained_on_something_else_than_generation_1(done: Any) -> None:
    """At the same setting and seed: other losses, and so other students."""
    _, folder, _, count, _ = done
    (job, *_) = count.trained("generation-1")
    losses = {}
    for transform in ("none", "confidence", "virtual", "hard", "class_mean", "permuted"):
        student = str(folder.path / "other" / transform / "student.safetensors")
        rows = list(run_job("train", {**job, "transform": transform, "student": student}))
        losses[transform] = [row["loss"] for row in rows]
    assert len(set(map(tuple, losses.values()))) == 6
    again = list(run_job("train", {**job, "transform": "permuted", "student": student}))
    assert [row["loss"] for row in again] == losses["permuted"]


def test_the_ensemble_of_seeds_is_as_large_as_that_of_generations(done: Any) -> None:
    config, folder, summary, count, _ = done
    jobs = count.trained("control_seeds")
    assert [job["seed"] for job in jobs] == confirm_seeds(config, 2)
    assert all(job["teachers"] == [] for job in jobs)
    row = control(summary, "seeds")
    labels = make_task(to_tree(config)).labels("test").numpy()

    def hits(hashes: Sequence[str]) -> Any:
        files = [predictions(folder, digest) for digest in hashes]
        each = [softmax(load_tensors(file)[0]["test"].double().numpy(), axis=1) for file in files]
        return np.mean(each, axis=0).argmax(1) == labels

    paths = (folder.path / "controls" / "seeds").glob("trial_*/result.json")
    seeds = hits([load_row(TrialResult, path).hash for path in sorted(paths)])
    generations = [result.hash for result in summary.generations]
    assert row.mean.value == pytest.approx(seeds.mean())
    assert row.mean.low < row.mean.value < row.mean.high
    assert row.values == (row.mean.value,)
    assert row.first.value == pytest.approx(seeds.mean() - hits(generations[:1]).mean())
    gain = row.born_again
    assert gain.value == pytest.approx(hits(generations).mean() - seeds.mean())
    assert gain.low <= gain.value <= gain.high
    ensemble = summary.ensemble.metrics["test_accuracy"]
    assert ensemble == pytest.approx(hits(generations).mean())
    found = next(each for each in summary.against_controls.comparisons if each.difference == gain)
    assert (found.name, found.to) == ("the ensemble of 2 generations", f"the {row.title}")


def test_the_verdict_has_a_sentence_on_the_controls(done: Any) -> None:
    _, _, summary, _, _ = done
    beside = summary.against_controls
    assert [each.to for each in beside.comparisons] == [
        *("the ensemble of 2 seeds", "label smoothing", "permuted teacher logits"),
        *("confidence weights", "teacher-free"),
    ]
    (said,) = beside.sentences
    assert summary.verdict.sentences[-1] == said
    assert said.startswith("at equal cost: ")
    assert said.endswith("; corrected for all 5 comparisons (Holm)")
    assert said.count("generation 1") == 4
    assert "1,197 test images" in said


def test_no_student_of_a_control_is_kept(done: Any) -> None:
    _, folder, _, _, _ = done
    assert not list((folder.path / "controls").rglob("student.safetensors"))


def test_what_is_done_is_not_done_again(done: Any) -> None:
    config, folder, summary, _, _ = done
    assert finished(config, folder) == summary
    count = Count()
    assert whole(config, folder, count) == summary
    assert {kind for kind, _ in count.jobs} == {"check", "average"}


@pytest.mark.parametrize("stop", [29, 37, 45, 53])
def test_a_stopped_run_ends_with_the_same_controls(done: Any, tmp_path: Path, stop: int) -> None:
    config, _, summary, count, _ = done
    assert stop < len(count.jobs)
    folder = RunFolder.create(tmp_path / "run", config)
    with pytest.raises(KeyboardInterrupt):
        whole(config, folder, Count(stop=stop))
    assert finished(config, folder) is None
    assert whole(config, folder, Count()).controls == summary.controls


def test_more_generations_take_more_seeds(tmp_path: Path) -> None:
    config = load_config(settings=[*TINY, "controls=[seeds]", "confirm.seeds=1"])
    folder = RunFolder.create(tmp_path / "run", config)
    whole(config, folder, Count())
    more = load_config(settings=[*TINY, "controls=[seeds]", "confirm.seeds=1", "rounds=2"])
    count = Count()
    row = control(whole(more, folder, count), "seeds")
    assert (row.models, row.title) == (3, "ensemble of 3 seeds")
    assert len(count.trained("control_seeds")) == 1
    assert load_row(ControlResult, folder.path / "controls" / "seeds" / "result.json") == row


def test_more_seeds_are_trained_of_the_controls_too(done: Any, tmp_path: Path) -> None:
    """What three seeds from the start give, and one seed with two more later, is the same."""
    config, _, summary, _, _ = done
    few = load_config(settings=[*TINY, ALL, "confirm.seeds=1"])
    folder = RunFolder.create(tmp_path / "run", few)
    whole(few, folder, Count())
    count = Count()
    found = whole(config, folder, count)
    assert len(count.kinds("train")) == (2 + 4) * 2
    assert found.controls == summary.controls
    assert found.verdict == summary.verdict
    assert finished(config, folder) == found
