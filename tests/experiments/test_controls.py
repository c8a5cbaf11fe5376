"""Controls of equal cost: what each is trained on, how it is measured, kept and resumed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.special import softmax
from scipy.stats import ttest_rel

from selfkd.config import Config, load_config, to_tree
from selfkd.execution.jobs import InProcess
from selfkd.experiments.arms import confirm_seeds
from selfkd.experiments.generations import born_again, complete, finished
from selfkd.experiments.run_folder import RunFolder
from selfkd.results import Row
from selfkd.storage.checkpoint import load_tensors
from selfkd.storage.files import load_json
from selfkd.tasks.images.task import Bench
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


class Ear:
    """A listener that remembers stages."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int, int]] = []

    def stage_started(self, title: str, trials: int, done: int) -> None:
        self.stages.append((title, trials, done))

    def __getattr__(self, name: str) -> Any:
        return lambda *_: None


class Count:
    """Does jobs for real, and remembers them.

    Args:
        stop: the job at which it is interrupted.
    """

    def __init__(self, *, stop: int | None = None) -> None:
        self.jobs: list[tuple[str, Mapping[str, Any]]] = []
        self.stop = stop

    def __call__(self, kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
        if self.stop is not None and len(self.jobs) >= self.stop:
            raise KeyboardInterrupt
        self.jobs.append((kind, payload))
        yield from run_job(kind, payload)

    def trained(self, stage: str) -> list[Mapping[str, Any]]:
        return [job for kind, job in self.jobs if kind == "train" and job["stage"] == stage]


def whole(config: Config, folder: RunFolder, count: Count, ear: Ear | None = None) -> Row:
    ear = ear or Ear()
    results = born_again(config, folder, InProcess(count), ear)
    return complete(config, folder, InProcess(count), ear, results)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, RunFolder, Row, Count, Ear]:
    config = load_config(settings=[*TINY, ALL])
    folder = RunFolder.create(tmp_path_factory.mktemp("controls") / "run", config)
    count, ear = Count(), Ear()
    return config, folder, whole(config, folder, count, ear), count, ear


def control(summary: Row, name: str) -> Row:
    (row,) = (row for row in summary["controls"] if row["name"] == name)
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
    born_again = summary["generations"][1]["confirmation"]["test_accuracy"]
    first = summary["generations"][0]["confirmation"]["test_accuracy"]
    for key, pairs in (
        ("born_again", (born_again, row["test_accuracy"])),
        ("first", (row["test_accuracy"], first)),
    ):
        assert row[key]["value"] == pytest.approx(np.subtract(*pairs).mean())
        if row[key]["low"] is not None:
            expected = ttest_rel(*pairs).confidence_interval()
            assert row[key]["low"] == pytest.approx(expected.low)
    assert row["verdict"].count("3 paired seeds") == 2


def test_the_strength_of_label_smoothing_is_searched_without_a_teacher(done: Any) -> None:
    _, _, summary, count, _ = done
    jobs = count.trained("control_label_smoothing")
    strengths = [job["config"]["train"]["label_smoothing"] for job in jobs]
    assert len(set(strengths)) == 3
    assert all(0 <= strength <= 0.5 for strength in strengths)
    assert all(job["teachers"] == [] and "knowledge" not in job for job in jobs)
    chosen = control(summary, "label_smoothing")["point"]["train.label_smoothing"]
    assert chosen in strengths
    confirmed = count.trained("control_label_smoothing_confirm")
    assert {job["config"]["train"]["label_smoothing"] for job in confirmed} == {chosen}


def test_permuted_knowledge_has_the_teacher_of_generation_1(done: Any) -> None:
    _, _, _, count, _ = done
    jobs = [*count.trained("control_dkpp"), *count.trained("control_dkpp_confirm")]
    assert {job["knowledge"] for job in jobs} == {"permuted"}
    (first, *_) = count.trained("generation-1")
    assert all(job["teachers"] == first["teachers"] for job in jobs)
    assert len({job["config"]["distill"]["temperature"] for job in jobs[:3]}) == 3


def test_confidence_weights_have_that_teacher_and_search_neither_t_nor_alpha(done: Any) -> None:
    config, _, summary, count, _ = done
    jobs = [*count.trained("control_cwtm"), *count.trained("control_cwtm_confirm")]
    assert {job["knowledge"] for job in jobs} == {"confidence"}
    (first, *_) = count.trained("generation-1")
    assert all(job["teachers"] == first["teachers"] for job in jobs)
    assert all(job["config"] == to_tree(config) for job in jobs)
    assert control(summary, "cwtm")["point"] == {}


def test_teacher_free_has_no_teacher(done: Any) -> None:
    _, _, _, count, _ = done
    jobs = [*count.trained("control_teacher_free"), *count.trained("control_teacher_free_confirm")]
    assert all(job["knowledge"] == "virtual" and job["teachers"] == [] for job in jobs)
    assert len({job["config"]["distill"]["alpha"] for job in jobs[:3]}) == 3


def test_controls_learn_something_else_than_generation_1(done: Any) -> None:
    """At the same setting and seed: other losses, and so other students."""
    _, folder, _, count, _ = done
    (job, *_) = count.trained("generation-1")
    losses = {}
    for knowledge in ("whole", "confidence", "virtual", "permuted"):
        student = str(folder.path / "other" / knowledge / "student.safetensors")
        rows = list(run_job("train", {**job, "knowledge": knowledge, "student": student}))
        losses[knowledge] = [row["loss"] for row in rows]
    assert len(set(map(tuple, losses.values()))) == 4
    again = list(run_job("train", {**job, "knowledge": "permuted", "student": student}))
    assert [row["loss"] for row in again] == losses["permuted"]


def test_the_ensemble_of_seeds_is_as_large_as_that_of_generations(done: Any) -> None:
    config, folder, summary, count, _ = done
    jobs = count.trained("control_seeds")
    assert [job["seed"] for job in jobs] == confirm_seeds(config, 2)
    assert all(job["teachers"] == [] for job in jobs)
    row = control(summary, "seeds")
    labels = Bench(to_tree(config)).labels("test").numpy()

    def hits(files: Sequence[Path]) -> Any:
        each = [softmax(load_tensors(file)[0]["test"].double().numpy(), axis=1) for file in files]
        return np.mean(each, axis=0).argmax(1) == labels

    seeds = hits(sorted((folder.path / "controls" / "seeds").glob("*/predictions.safetensors")))
    files = [folder.generation(number) / "predictions.safetensors" for number in (0, 1)]
    assert row["mean"]["value"] == pytest.approx(seeds.mean())
    assert row["mean"]["low"] < row["mean"]["value"] < row["mean"]["high"]
    assert row["test_accuracy"] == [row["mean"]["value"]]
    assert row["first"]["value"] == pytest.approx(seeds.mean() - hits(files[:1]).mean())
    gain = row["born_again"]
    assert gain["value"] == pytest.approx(hits(files).mean() - seeds.mean())
    assert gain["low"] <= gain["value"] <= gain["high"]
    assert summary["ensemble"]["test_accuracy"] == pytest.approx(hits(files).mean())
    assert "the ensemble of 2 generations" in row["verdict"]
    assert "1,197 test images" in row["verdict"]


def test_no_student_of_a_control_is_kept(done: Any) -> None:
    _, folder, _, _, _ = done
    assert not list((folder.path / "controls").rglob("student.safetensors"))


def test_what_is_done_is_not_done_again(done: Any) -> None:
    config, folder, summary, _, _ = done
    assert finished(config, folder) == summary
    count = Count()
    assert whole(config, folder, count) == summary
    assert {kind for kind, _ in count.jobs} == {"check", "measure"}


@pytest.mark.parametrize("stop", [29, 37, 45, 53])
def test_a_stopped_run_ends_with_the_same_controls(done: Any, tmp_path: Path, stop: int) -> None:
    config, _, summary, count, _ = done
    assert stop < len(count.jobs)
    folder = RunFolder.create(tmp_path / "run", config)
    with pytest.raises(KeyboardInterrupt):
        whole(config, folder, Count(stop=stop))
    assert finished(config, folder) is None
    assert whole(config, folder, Count())["controls"] == summary["controls"]


def test_more_generations_take_more_seeds(tmp_path: Path) -> None:
    config = load_config(settings=[*TINY, "controls=[seeds]", "confirm.seeds=1"])
    folder = RunFolder.create(tmp_path / "run", config)
    whole(config, folder, Count())
    more = load_config(settings=[*TINY, "controls=[seeds]", "confirm.seeds=1", "rounds=2"])
    count = Count()
    row = control(whole(more, folder, count), "seeds")
    assert (row["members"], row["title"]) == (3, "ensemble of 3 seeds")
    assert len(count.trained("control_seeds")) == 1
    assert load_json(folder.path / "controls" / "seeds" / "result.json") == row
