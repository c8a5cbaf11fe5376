"""`python -m selfkd.response`: what it reads of run folders, and its table and words."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from selfkd.analysis.response import Effect
from selfkd.config import load_config
from selfkd.experiments.run_folder import RunFolder
from selfkd.response import describe_effect, find_responses, main, read_stages
from selfkd.results import (
    Facts,
    GenerationResult,
    Interval,
    SearchesOfSizes,
    SearchOfSize,
    TrialResult,
)
from selfkd.storage.rows import load_row, save_row


def make_run(
    folder: Path,
    name: str,
    *settings: str,
    peaks: tuple[float, ...] = (0.3, 0.3),
    trials: int = 8,
    parameters: int = 1000,
    stage: str | None = None,
) -> Path:
    """A run as selfkd.generations leaves it; the best alpha of generation k is `peaks[k - 1]`."""
    space = "{distill.temperature: {loguniform: [1, 20]}, distill.alpha: {uniform: [0, 1]}}"
    config = load_config(settings=[f"search.space={space}", *settings])
    run = RunFolder.create(folder / name, config)
    sizes = {"model": 9, "student": parameters}
    save_row(run.path / "data.json", Facts(parameters=sizes, fingerprints={"train": "same"}))
    rng = np.random.default_rng(0)
    for generation in range(len(peaks) + 1):
        for number in range(trials):
            t, alpha = float(20 ** rng.random()), (number + rng.random()) / trials
            value = 0.95 - 0.1 * (alpha - peaks[generation - 1]) ** 2 + rng.normal(0, 0.001)
            point = {"distill.temperature": t, "distill.alpha": alpha} if generation else {}
            trial = TrialResult(
                stage=f"generation-{generation}",
                trial=number,
                seed=number,
                point=point,
                status="completed",
                metrics={"val_accuracy": value},
            )
            place = run.generation(generation) if stage is None else run.path / stage
            save_row(place / f"trial_{number:03d}" / "result.json", trial)
        result = GenerationResult(generation=generation, trial=0)
        save_row(run.generation(generation) / "result.json", result)
    return run.path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_run(tmp_path_factory.mktemp("run"), "one", peaks=(0.2, 0.9))


def test_reads_each_generation_that_has_a_teacher(run: Path) -> None:
    stages, notes = read_stages(run)
    assert [stage.name for stage in stages] == ["generation 1", "generation 2"]
    assert [len(stage.trials) for stage in stages] == [8, 8]
    assert stages[0].ranges == ((1.0, 20.0), (0.0, 1.0))  # of the search, not of the trials
    assert stages[0].parameters == 1000
    assert notes == []


def test_prints_best_region_and_drift(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run)]) == 0
    printed = capsys.readouterr().out
    rows = [line.split() for line in printed.splitlines() if line.startswith(" generation")]
    assert [row[:3] for row in rows] == [["generation", "1", "8"], ["generation", "2", "8"]]
    assert "accuracy depends on alpha" in printed
    assert ": accuracy depends on T" not in printed
    assert "indistinguishable from the best with these trials: T 1 to 20 and alpha 0." in printed
    assert "over the generations of one, for a generation: no evidence that the best T" in printed
    assert "the best alpha drifts: +0." in printed


def test_json_is_what_a_report_draws(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(run), "--format", "json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    response = tree["responses"][0]["response"]
    assert len(response["mean"]) == len(response["temperatures"])
    assert len(response["mean"][0]) == len(response["alphas"])
    assert tree["drifts"][0]["over"] == "over the generations of one"


def test_several_runs_show_the_drift_with_size(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    runs = [
        make_run(tmp_path, f"run-{size}", peaks=(peak,), parameters=size)
        for size, peak in ((1_000, 0.1), (10_000, 0.5), (100_000, 0.9))
    ]
    assert main([str(path) for path in runs]) == 0
    printed = capsys.readouterr().out
    (line,) = (line for line in printed.splitlines() if "student's size" in line)
    assert "for ten times the parameters" in line
    slope = float(line.split("the best alpha drifts: ")[1].split()[0])
    assert slope == pytest.approx(0.4, abs=0.1)
    assert "no evidence that the best alpha" not in line


def test_what_is_no_run_or_has_no_trials_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tmp_path)]) == 2
    assert "RUN must be a run folder (with a config.yaml)" in capsys.readouterr().err
    empty = RunFolder.create(tmp_path / "empty", load_config())
    assert main([str(empty.path)]) == 2
    error = capsys.readouterr().err
    assert error.splitlines() == [
        f"error: RUN must have completed trials with a teacher and a val_accuracy, got {empty.path}"
    ]


def test_a_damaged_result_is_named_and_omitted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(tmp_path, "one", peaks=(0.3,))
    damaged = path / "generation_001" / "trial_003" / "result.json"
    damaged.write_text("{")
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "omitted: " in printed
    assert str(damaged) in printed
    assert [len(stage.trials) for stage in read_stages(path)[0]] == [7]


def test_a_damaged_field_is_named(tmp_path: Path) -> None:
    path = make_run(tmp_path, "one", peaks=(0.3,))
    damaged = path / "generation_001" / "trial_003" / "result.json"
    damaged.write_text('{"format": 1, "stage": "a", "trial": "x"}')
    stages, (note,) = read_stages(path)
    assert note.startswith(f"omitted: {damaged} is damaged (trial: ")
    assert [len(stage.trials) for stage in stages] == [7]


@pytest.mark.parametrize(
    ("temperature", "fault"),
    [(-3.0, "point: T must be above 0, got -3.0"), ("x", "point: T and alpha are ['x', 0.")],
)
def test_a_damaged_setting_is_named(tmp_path: Path, temperature: object, fault: str) -> None:
    path = make_run(tmp_path, "one", peaks=(0.3,))
    (path / "generation_copy").mkdir()  # no generation
    damaged = path / "generation_001" / "trial_003" / "result.json"
    trial = load_row(TrialResult, damaged)
    save_row(damaged, replace(trial, point={**trial.point, "distill.temperature": temperature}))
    (stage,), (note,) = read_stages(path)
    assert note.startswith(f"omitted: {damaged} is damaged ({fault}")
    assert len(stage.trials) == 7


def test_failed_and_stopped_trials_do_not_count(tmp_path: Path) -> None:
    path = make_run(tmp_path, "one", peaks=(0.3,))
    for number, status in ((0, "failed"), (1, "stopped")):
        file = path / f"generation_001/trial_00{number}/result.json"
        save_row(file, replace(load_row(TrialResult, file), status=status))
    assert [len(stage.trials) for stage in read_stages(path)[0]] == [6]


def test_too_few_trials_are_a_row_that_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = make_run(tmp_path, "one", peaks=(0.3,), trials=3)
    assert main([str(path)]) == 0
    assert "at least 5 trials are needed, got 3" in capsys.readouterr().out


def test_a_running_generation_is_marked(tmp_path: Path) -> None:
    path = make_run(tmp_path, "one")
    (path / "generation_002" / "result.json").unlink()
    names = [stage.name for stage in read_stages(path)[0]]
    assert names == ["generation 1", "generation 2, unfinished"]


def test_an_ensemble_s_student_is_read_too(tmp_path: Path) -> None:
    path = make_run(tmp_path, "one", peaks=(0.3,), stage="student")
    assert [stage.name for stage in read_stages(path)[0]] == ["student"]


def test_the_searches_of_a_capacity_run_are_read_too(tmp_path: Path) -> None:
    path = make_run(tmp_path, "one", peaks=(0.3,), stage="search_width-4")
    search = SearchOfSize(value=4, parameters=1200, search="search_width-4")
    save_row(path / "students.json", SearchesOfSizes(key="model.args.width", students=(search,)))
    (stage,) = read_stages(path)[0]
    assert (stage.name, stage.parameters) == ("student 4", 1200)


def test_what_else_was_searched_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    space = "search.space.train.lr={loguniform: [0.01, 0.1]}"
    path = make_run(tmp_path, "one", space, peaks=(0.3,))
    assert main([str(path)]) == 0
    assert "searched too, and noise to this fit: train.lr" in capsys.readouterr().out


def test_what_is_fixed_by_the_config_is_no_variable(tmp_path: Path) -> None:
    path = make_run(tmp_path, "one", "distill.temperature=3.0", peaks=(0.3,))
    for trial in path.glob("generation_001/trial_*/result.json"):
        row = load_row(TrialResult, trial)
        point = {"distill.alpha": row.point["distill.alpha"]}
        save_row(trial, replace(row, point=point))
    (found,) = find_responses(read_stages(path)[0])
    assert found.response is not None
    assert found.response.temperatures == [3.0]
    assert found.response.temperature is None


@pytest.mark.parametrize(
    ("probability", "high", "words"),
    [
        (0.99, 0.02, "accuracy depends on T, which moves it by 1.00% (sd over its range)"),
        (0.3, 0.002, "accuracy hardly depends on T, which moves it by at most 0.20%"),
        (0.7, 0.02, "no evidence that accuracy depends on T, and too few trials to rule it out"),
    ],
)
def test_effects_in_words(probability: float, high: float, words: str) -> None:
    effect = Effect(probability=probability, share=0.5, change=Interval(0.01, 0.0, high))
    assert words in describe_effect("T", effect, 0.005)


def test_the_response_of_a_task_by_nll(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = make_run(tmp_path, "nll", "search.metric=val_nll", peaks=(0.3,))
    facts = load_row(Facts, path / "data.json")
    save_row(path / "data.json", replace(facts, metric="nll", mode="min"))
    for file in path.glob("generation_*/trial_*/result.json"):
        trial = load_row(TrialResult, file)
        save_row(file, replace(trial, metrics={"val_nll": 4 - 20 * trial.metrics["val_accuracy"]}))
    assert main([str(path)]) == 0
    printed = capsys.readouterr().out
    assert "val NLL there" in printed
    assert "NLL depends on alpha, which moves it by 0." in printed
    assert "where the fitted surface is lowest" in printed
    assert "accuracy" not in printed
    assert "%" not in printed.split("NLL depends on alpha")[1].split("(sd over")[0]
    (found,) = find_responses(read_stages(path)[0])
    assert found.response is not None
    assert abs(found.response.best_alpha.value - 0.3) < 0.2
    assert found.response.best_accuracy.value == min(map(min, found.response.mean))
    accuracy = make_run(tmp_path, "accuracy")
    assert main([str(path), str(accuracy)]) == 2
    assert "must have the same metric, got accuracy, nll" in capsys.readouterr().err


def test_starts_without_torch(run: Path) -> None:
    code = (
        "import sys; from selfkd.response import main; "
        f"main([{str(run)!r}]); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=600)
