"""The born-again loop in one process: what it chooses, keeps, resumes and refuses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from engine import Recorder, StopAfter, make_run, without_clock

from selfkd.config import Config, load_config, to_tree
from selfkd.errors import ConfigError, RunError
from selfkd.experiments.generations import born_again, finished
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.stages import trial_seed
from selfkd.results import Examples, Facts, GenerationResult, GenerationsSummary, Row, TrialResult
from selfkd.storage.rows import load_row
from selfkd.worker.jobs import run_job

TINY = [
    "model={name: selfkd_mlp, args: {width: 16, depth: 1}}",
    "train.epochs=2",
    "search.trials=3",
    "rounds=2",
    "confirm.seeds=0",
]


class Fake:
    """Does jobs without training: accuracies by (generation, trial) as a test wants them."""

    def __init__(self, accuracy: Mapping[tuple[int, int], float | str]) -> None:
        self.accuracy = accuracy
        self.broken = ""
        self.jobs: list[tuple[str, Mapping[str, Any]]] = []

    def __call__(self, kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
        self.jobs.append((kind, payload))
        if kind == "check":
            yield {"facts": {"items": {"train": 200}, "views": 1}}
        elif kind == "train":
            student = Path(payload["student"])
            number, generation = int(student.parent.name[-3:]), _generation(payload)
            value = self.accuracy.get((generation, number), 0.5)
            if isinstance(value, str):
                raise ValueError(value)
            student.parent.mkdir(parents=True, exist_ok=True)
            student.write_text(f"{generation}/{number}")
            yield {"epoch": 1, "val_accuracy": 0.0, "val_nll": 9.0, "seconds": 1.0}
            yield {
                "epoch": 2,
                "val_accuracy": value,
                "val_nll": 1.0 - number / 100,
                "seconds": 2.0,
                "hash": f"{generation}-{number}",
            }
        elif kind == "cache_teacher_logits":
            yield {"state": "written"}
        elif kind == "evaluate":
            digest = "-".join(Path(payload["student"]).read_text().split("/"))
            yield {"hash": digest, "test_accuracy": 0.4, "test_nll": 1.0, "test_ece": 0.1}
        elif kind == "average":
            yield {"rows": [{"hash": "all", "test_accuracy": 0.5}]}
        elif kind == "examples":
            if self.broken:
                raise OSError(self.broken)
            yield {"counts": [3, 1]}

    def kinds(self, kind: str) -> list[Mapping[str, Any]]:
        return [payload for name, payload in self.jobs if name == kind]


def _generation(payload: Mapping[str, Any]) -> int:
    return int(payload["stage"].removeprefix("generation-"))


def start(folder: Path, *settings: str) -> tuple[Config, RunFolder]:
    config = load_config(settings=[*TINY, *settings])
    return config, RunFolder.create(folder / "run", config)


def lineage(
    config: Config, folder: RunFolder, do: Any, events: Recorder | None = None
) -> list[GenerationResult]:
    """Make the generations; return their results as they are kept."""
    born_again(make_run(config, folder, do, events))
    return folder.results()


def test_best_on_validation_teaches_the_next_generation(tmp_path: Path) -> None:
    config, folder = start(tmp_path)
    fake = Fake({(0, 1): 0.9, (1, 2): 0.8, (2, 0): 0.7})
    results = lineage(config, folder, fake)
    assert [result.trial for result in results] == [1, 2, 0]
    taught_by = [job["teachers"] for job in fake.kinds("train")]
    assert taught_by[:3] == [[], [], []]
    best = [folder.generation(g) / "student.safetensors" for g in (0, 1)]
    assert taught_by[3:6] == [[{"hash": "0-1", "checkpoint": str(best[0])}]] * 3
    assert taught_by[6:] == [[{"hash": "1-2", "checkpoint": str(best[1])}]] * 3
    assert best[0].read_text() == "0/1"


def test_what_tells_the_first_and_the_best_later_generation_apart_is_kept(tmp_path: Path) -> None:
    config, folder = start(tmp_path)
    fake = Fake({(0, 0): 0.9, (1, 2): 0.8, (2, 1): 0.7})
    lineage(config, folder, fake)
    (asked,) = fake.kinds("examples")
    assert [model["hash"] for model in asked["models"]] == ["0-0", "1-2"]
    kept = load_row(Examples, folder.path / "examples.json")
    assert (kept.generations, kept.hashes, kept.counts) == ((0, 1), ("0-0", "1-2"), (3, 1))
    lineage(config, folder, fake)
    assert len(fake.kinds("examples")) == 1  # of the same two models


def test_examples_that_cannot_be_had_cost_no_run(tmp_path: Path) -> None:
    config, folder = start(tmp_path)
    fake, events = Fake({}), Recorder()
    fake.broken = "no memory"
    lineage(config, folder, fake, events)
    assert (folder.path / "summary.json").exists()
    assert any(note.startswith("no examples for the report: ") for note in events.notes)


def test_ties_go_to_the_lower_nll(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "rounds=0")
    (result,) = lineage(config, folder, Fake({}))
    assert result.trial == 2  # of three equal accuracies the fake's NLL falls with the number


def test_the_test_split_is_read_once_a_generation_and_only_for_the_chosen(tmp_path: Path) -> None:
    config, folder = start(tmp_path)
    fake = Fake({})
    lineage(config, folder, fake)
    assert [Path(job["student"]).parent.name for job in fake.kinds("evaluate")] == [
        "generation_000",
        "generation_001",
        "generation_002",
    ]


def test_every_generation_has_as_many_trials_and_the_teacher_is_asked_once(tmp_path: Path) -> None:
    config, folder = start(tmp_path)
    fake = Fake({})
    lineage(config, folder, fake)
    assert [_generation(job) for job in fake.kinds("train")] == [0] * 3 + [1] * 3 + [2] * 3
    assert len(fake.kinds("cache_teacher_logits")) == 2


def test_seeds_differ_between_trials_and_generations(tmp_path: Path) -> None:
    config, folder = start(tmp_path)
    fake = Fake({})
    lineage(config, folder, fake)
    assert len({job["seed"] for job in fake.kinds("train")}) == 9
    assert trial_seed(0, 1, 2) != trial_seed(1, 1, 2)


def test_the_previous_winner_s_setting_is_tried_again(tmp_path: Path) -> None:
    config, folder = start(tmp_path)
    fake = Fake({(1, 2): 0.9})
    results = lineage(config, folder, fake)
    first_of_generation_2 = fake.kinds("train")[6]["config"]["distill"]
    assert first_of_generation_2["temperature"] == results[1].temperature
    assert first_of_generation_2["alpha"] == results[1].alpha


def test_points_are_tried_after_the_previous_winner(tmp_path: Path) -> None:
    outside = "search.points=[{distill.temperature: 30, distill.alpha: 0}, {train.lr: 0.5}]"
    config, folder = start(tmp_path, outside)
    fake = Fake({(1, 2): 0.9})
    results = lineage(config, folder, fake)
    jobs = [job["config"] for job in fake.kinds("train")]
    assert {job["train"]["lr"] for job in jobs[:3]} == {config.train.lr}
    (far, own, drawn), (winner, again, lr) = jobs[3:6], jobs[6:9]
    assert far["distill"]["temperature"] == again["distill"]["temperature"] == 30
    assert own["train"]["lr"] == lr["train"]["lr"] == 0.5
    assert lr["distill"] == own["distill"] == to_tree(config)["distill"]
    assert winner["distill"]["alpha"] == drawn["distill"]["alpha"] == results[1].alpha


def test_generation_0_searches_its_own_space(tmp_path: Path) -> None:
    space = "search.labels_only_space={train.label_smoothing: {uniform: [0, 0.2]}}"
    config, folder = start(tmp_path, space)
    fake = Fake({})
    results = lineage(config, folder, fake)
    smoothing = [job["config"]["train"]["label_smoothing"] for job in fake.kinds("train")]
    assert len(set(smoothing[:3])) == 3
    assert smoothing[3:] == [0.0] * 6
    assert results[0].temperature is None


@pytest.mark.parametrize(
    ("teacher", "expected"),
    [
        ("previous", [[], ["0-2"], ["1-2"]]),
        ("lineage", [[], ["0-2"], ["0-2", "1-2"]]),
        ("top:2", [[], ["0-2", "0-1"], ["1-2", "1-1"]]),
    ],
)
def test_teachers(tmp_path: Path, teacher: str, expected: list[list[str]]) -> None:
    config, folder = start(tmp_path, f"distill.teacher={teacher}")
    fake = Fake({})
    lineage(config, folder, fake)
    hashes = [[t["hash"] for t in job["teachers"]] for job in fake.kinds("train")]
    assert [hashes[0], hashes[3], hashes[6]] == expected
    for job in fake.kinds("train"):
        assert all(Path(t["checkpoint"]).exists() for t in job["teachers"])


def test_only_students_that_teach_are_kept(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "distill.teacher=top:2")
    lineage(config, folder, Fake({}))
    kept = sorted(str(p.relative_to(folder.path)) for p in folder.path.rglob("student.safetensors"))
    assert [name for name in kept if name.startswith("generation_000")] == [
        "generation_000/student.safetensors",
        "generation_000/trial_001/student.safetensors",
    ]


def test_a_failed_trial_is_left_out_and_the_generation_goes_on(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "rounds=0")
    ear = Recorder()
    fake = Fake({(0, 2): "loss must be finite", (0, 1): 0.9})
    (result,) = lineage(config, folder, fake, ear)
    assert (result.trial, result.failed) == (1, 1)
    assert ("generation-0", 2, "failed") in ear.finished
    failed = load_row(TrialResult, folder.generation(0) / "trial_002" / "result.json")
    assert failed.error == "ValueError: loss must be finite"


def test_when_all_trials_fail_the_first_error_is_told(tmp_path: Path) -> None:
    config, folder = start(tmp_path)
    fake = Fake({(1, n): f"broken {n}" for n in range(3)})
    with pytest.raises(RunError, match=r"3 trials of generation 1 failed; the first: .*broken 0"):
        lineage(config, folder, fake)
    assert len(folder.results()) == 1


def ledger(folder: RunFolder) -> list[GenerationResult]:
    """What a run found, without what a clock measured."""
    return [replace(result, seconds=0.0) for result in folder.results()]


@pytest.mark.parametrize("jobs", range(15))
def test_resumed_run_equals_an_undisturbed_one(tmp_path: Path, jobs: int) -> None:
    accuracy = {(0, 1): 0.9, (1, 0): 0.8, (2, 1): 0.7}
    config, whole = start(tmp_path / "whole")
    lineage(config, whole, Fake(accuracy))
    config, folder = start(tmp_path / "stopped")
    first, again = Fake(accuracy), Fake(accuracy)
    with pytest.raises(KeyboardInterrupt):
        lineage(config, folder, StopAfter(first, jobs))
    folder, config = RunFolder.open(folder.path)
    lineage(config, folder, again)
    assert ledger(folder) == ledger(whole)
    assert len(first.kinds("train")) + len(again.kinds("train")) == 9


def test_finished_generations_are_told_again_but_not_trained_again(tmp_path: Path) -> None:
    config, folder = start(tmp_path)
    lineage(config, folder, Fake({}))
    fake, ear = Fake({}), Recorder()
    lineage(config, folder, fake, ear)
    assert [kind for kind, _ in fake.jobs] == ["check", "average"]
    assert ear.chosen == [0, 1, 2]
    assert ear.stages == []


def test_rounds_can_be_raised_on_resume(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "rounds=1")
    lineage(config, folder, Fake({}))
    more = load_config(settings=[*TINY, "rounds=2"])
    folder.check_change(config, more)
    fake = Fake({})
    assert len(lineage(more, folder, fake)) == 3
    assert RunFolder.open(folder.path)[1].rounds == 2
    assert len(fake.kinds("train")) == 3


def test_rounds_cannot_be_lowered_below_what_is_done(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "rounds=1")
    lineage(config, folder, Fake({}))
    with pytest.raises(ConfigError, match="rounds must be at least the 1 done, got 0"):
        folder.check_change(config, load_config(settings=[*TINY, "rounds=0"]))


def test_resume_with_another_config_says_what_differs(tmp_path: Path) -> None:
    config, folder = start(tmp_path)
    other = load_config(settings=[*TINY, "train.lr=0.5", "tracking=none", "data.jitter=1"])
    with pytest.raises(ConfigError) as error:
        folder.check_change(config, other)
    assert "train.lr: 0.05 -> 0.5" in str(error.value)
    assert "data.jitter: 0 -> 1" in str(error.value)
    assert "tracking" not in str(error.value)


def test_a_folder_that_exists_is_refused(tmp_path: Path) -> None:
    config, folder = start(tmp_path)
    with pytest.raises(ConfigError, match=r"exists already: continue it with --resume .*/run"):
        RunFolder.create(folder.path, config)


def test_what_is_no_run_cannot_be_resumed(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="--resume must be a run folder"):
        RunFolder.open(tmp_path)


def test_a_damaged_result_is_named(tmp_path: Path) -> None:
    config, folder = start(tmp_path)
    lineage(config, folder, Fake({}))
    (folder.generation(1) / "result.json").write_text('{"generation": 1,')
    with pytest.raises(ValueError, match=r"generation_001/result.json is damaged"):
        folder.results()


def test_a_run_folder_can_be_moved(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "rounds=1")
    lineage(config, folder, Fake({}))
    moved = folder.path.rename(tmp_path / "elsewhere")
    folder, config = RunFolder.open(moved)
    more = load_config(settings=[*TINY, "rounds=2"])
    results = lineage(more, folder, fake := Fake({}))
    assert len(results) == 3
    assert all(str(moved) in t["checkpoint"] for j in fake.kinds("train") for t in j["teachers"])


def test_a_repeated_trial_does_not_keep_its_first_epochs_twice(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "rounds=0")

    class Repeats(Fake):
        def __call__(self, kind: str, payload: Mapping[str, Any]) -> Iterator[Row]:
            if kind == "train":
                yield {"epoch": 1, "val_accuracy": 0.1, "val_nll": 9.0, "seconds": 1.0}
            yield from super().__call__(kind, payload)

    (result,) = lineage(config, folder, Repeats({}))
    assert [row.epoch for row in result.history] == [1, 2]


def test_the_whole_on_real_digits_is_the_same_run_to_run(tmp_path: Path) -> None:
    """Two generations through the real trial: equal tables, and weights equal bit for bit."""
    found = []
    for name in ("a", "b"):
        config, folder = start(tmp_path / name, "rounds=1", "search.trials=2")
        summary = born_again(make_run(config, folder))
        kept = load_row(GenerationsSummary, folder.path / "summary.json")
        assert finished(config, folder) == summary == kept
        found.append(replace(summary, generations=tuple(map(without_clock, summary.generations))))
    assert found[0] == found[1]
    first, second = found[0].generations
    assert first.hash != second.hash
    assert found[0].ensemble is not None
    assert 0 < found[0].ensemble.metrics["test_accuracy"] <= 1
    assert 0 < second.metrics["agreement"] <= 1
    examples = load_row(Examples, folder.path / "examples.json")
    assert examples.gained
    assert examples.counts[0] - examples.counts[1] == round(
        1197 * (second.metrics["test_accuracy"] - first.metrics["test_accuracy"])
    )


def test_a_mistake_in_the_data_is_the_user_s(tmp_path: Path) -> None:
    config, folder = start(tmp_path, "data.train_size=100000")
    with pytest.raises(ConfigError, match="train_size"):
        lineage(config, folder, run_job)


def test_failed_trials_are_tried_again_on_resume(tmp_path: Path) -> None:
    """As after a full disk or a file that had to be removed."""
    config, folder = start(tmp_path, "rounds=0")
    with pytest.raises(RunError):
        lineage(config, folder, Fake({(0, n): "disk full" for n in range(3)}))
    (result,) = lineage(config, folder, Fake({}))
    assert result.failed == 0


@pytest.mark.parametrize(("what", "name"), [("fingerprints", "test"), ("weights", "/model")])
def test_resume_on_other_data_or_weights_is_refused(tmp_path: Path, what: str, name: str) -> None:
    config, folder = start(tmp_path)
    first, other = (replace(Facts(outputs=10), **{what: {name: mark}}) for mark in ("abc", "def"))
    folder.keep(config, first)
    folder.keep(config, first)
    with pytest.raises(ConfigError, match=rf"on other data.*\n  {what}: .*{name}.*abc.*def"):
        folder.keep(config, other)


def test_a_setting_that_fails_the_check_is_not_kept(tmp_path: Path) -> None:
    config, folder = start(tmp_path)
    broken = load_config(settings=[*TINY, "data.train_size=100000"])
    with pytest.raises(ConfigError):
        lineage(broken, folder, run_job)
    assert RunFolder.open(folder.path)[1] == config
