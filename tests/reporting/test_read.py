"""What is read of a run folder: all that is there, and what is damaged by its name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from run_folders import (
    add_deployment,
    capacity_run,
    deploy_run,
    ensemble_run,
    generations_run,
    study_run,
)

from selfkd.errors import ConfigError
from selfkd.reporting.read import read_run


def change(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_finished_run(tmp_path: Path) -> None:
    run = read_run(generations_run(tmp_path / "run", rounds=2, trials=6))
    assert run.finished
    assert run.problems == ()
    assert [result.generation for result in run.results] == [0, 1, 2]
    assert [len(generation.trials) for generation in run.generations] == [6, 6, 6]
    assert run.trained == 18
    assert run.ensemble is not None
    last = run.generations[-1]
    assert last.confirmation is not None
    assert len(last.confirmation.values) == 3
    assert last.diagnostics["test"].reliability[-1].count == 900
    assert run.starts[-1]["versions"]["torch"] == "2.14.1"


def test_a_run_may_have_neither_diagnostics_nor_fresh_seeds(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run", seeds=0, diagnostics=False)
    (path / "environment.json").unlink()
    run = read_run(path)
    assert run.finished
    assert run.problems == ()
    assert all(g.confirmation is None and not g.diagnostics for g in run.generations)


def test_a_run_that_goes_on(tmp_path: Path) -> None:
    run = read_run(generations_run(tmp_path / "run", rounds=4, done=2))
    assert run.missing == "2 of 5 generations done, 2 of 6 trials of generation 2"
    assert run.generations[-1].result is None
    assert [trial.status for trial in run.generations[-1].trials] == ["completed", "failed"]


def test_a_run_whose_rounds_were_raised_is_unfinished(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run", rounds=2)
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("rounds: 2", "rounds: 4"))
    assert read_run(path).missing == "3 of 5 generations done"


def test_a_run_that_stopped_by_itself_is_finished(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run", rounds=2)
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("rounds: 2", "rounds: 9"))
    change(path / "summary.json", stopped="no gain twice in a row")
    run = read_run(path)
    assert run.finished
    assert run.stopped == "no gain twice in a row"


@pytest.mark.parametrize("make", [generations_run, ensemble_run, capacity_run, study_run])
def test_what_was_deployed_of_a_run(make: Callable[[Path], Path], tmp_path: Path) -> None:
    before = read_run(make(tmp_path / "run"))
    made = add_deployment(tmp_path / "run")
    run = read_run(tmp_path / "run")
    assert run.deploy_summary == made
    assert replace(run, deploy_summary=None) == before


def test_a_deployment_of_a_file_is_a_run_of_its_own(tmp_path: Path) -> None:
    path = deploy_run(tmp_path / "run")
    run = read_run(path)
    assert run.finished
    assert run.deploy_summary is not None
    (path / "deploy" / "deploy.json").unlink()
    with pytest.raises(ConfigError, match="must have a result"):
        read_run(path)


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{", "deploy.json is damaged"),
        ('{"rows": []}', "deploy.json is damaged: model"),
        ('{"model": "", "title": "a", "metric": "accuracy", "served": "", "rows": []}',
         "rows must not be empty"),
        ('{"model": "", "title": "a", "metric": "accuracy", "served": "", "rows": [],'
         '"files": {"int8.onnx": "../../etc/passwd"}}', "must be a file within the run folder"),
    ],
)  # fmt: skip
def test_a_damaged_deployment_is_a_problem(text: str, problem: str, tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run")
    add_deployment(path)
    (path / "deploy" / "deploy.json").write_text(text)
    run = read_run(path)
    assert run.deploy_summary is None
    assert any(problem in line for line in run.problems)
    assert len(run.results) == 3


def test_a_run_of_an_ensemble(tmp_path: Path) -> None:
    run = read_run(ensemble_run(tmp_path / "run"))
    assert run.finished
    assert {name: len(trials) for name, trials in run.stages.items()} == {
        "members": 3,
        "student": 4,
    }
    assert run.ensemble_summary is not None
    assert run.ensemble_summary.share is not None
    assert len(run.members) == 3


def test_an_ensemble_that_goes_on(tmp_path: Path) -> None:
    run = read_run(ensemble_run(tmp_path / "run", done=False))
    assert run.missing == "no summary yet, trials done: 3 of members, 4 of student"


DAMAGED = [
    ("generation_001/result.json", "{", "is damaged"),
    ("generation_001/result.json", "[]", "is damaged: all of it"),
    ("generation_001/result.json", '{"generation": 1}', "is damaged: trial: Field required"),
    ("generation_001/result.json", '{"generation": "x", "trial": 0}', "is damaged: generation"),
    ("generation_001/trial_002/result.json", '{"trial": 2}', "is damaged: stage: Field required"),
    ("generation_001/confirmation.json", '{"seeds": 3}', "is damaged: seeds"),
    ("summary.json", "\x00", "is damaged"),
    ("summary.json", "7", "is damaged: all of it"),
    ("data.json", '{"images":', "is damaged"),
    ("environment.json", "", "is damaged"),
    ("config.yaml", "a: [", "must be YAML"),
]


@pytest.mark.parametrize(("file", "text", "message"), DAMAGED)
def test_a_damaged_file_is_named_and_the_rest_is_read(
    tmp_path: Path, file: str, text: str, message: str
) -> None:
    path = generations_run(tmp_path / "run")
    (path / file).write_text(text)
    run = read_run(path)
    (problem,) = run.problems
    assert str(path / file) in problem
    assert message in problem
    assert "resume" not in problem
    assert run.results[0].generation == 0
    assert len(run.generations) == 3


def test_damaged_diagnostics_leave_the_result(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run")
    change(path / "generation_001" / "result.json", diagnostics={"test": {"scaled": "high"}})
    run = read_run(path)
    (problem,) = run.problems
    assert "generation_001/result.json is damaged: diagnostics.test.scaled: " in problem
    assert len(run.results) == 3
    assert run.results[1].metric("test_accuracy") is not None
    assert not run.generations[1].diagnostics


def test_the_summary_of_an_ensemble_has_rows(tmp_path: Path) -> None:
    path = ensemble_run(tmp_path / "run")
    change(path / "summary.json", rows=[])
    run = read_run(path)
    assert run.problems == (f"{path / 'summary.json'} is damaged: rows must not be empty",)
    assert run.ensemble_summary is None


def test_a_confirmation_has_as_many_values_as_seeds(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run")
    change(path / "generation_001" / "confirmation.json", values=[0.9, 0.95])
    run = read_run(path)
    (problem,) = run.problems
    assert "confirmation.json is damaged: values must be as many as seeds, got 2 and 3" in problem
    assert [generation.confirmation is None for generation in run.generations] == [
        *(False, True, False)
    ]


def test_each_damaged_field_is_named(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run")
    change(path / "generation_001" / "result.json", parameters="many", history=[{"epoch": "one"}])
    run = read_run(path)
    first, second = run.problems
    assert "generation_001/result.json is damaged: parameters: " in first
    assert "generation_001/result.json is damaged: history.0.epoch: " in second
    assert run.results[1].history == ()
    assert run.results[1].hash


@pytest.mark.parametrize(("line", "found"), [("format: 2\n", "2"), ("", "None")])
def test_a_run_of_another_format_is_named_and_read(tmp_path: Path, line: str, found: str) -> None:
    path = generations_run(tmp_path / "run")
    config = path / "config.yaml"
    config.write_text(config.read_text().replace("format: 1\n", line))
    run = read_run(path)
    assert run.problems == (f"{config} must be of format 1, got {found}",)
    assert run.get("rounds") == 2
    assert run.finished


def test_no_run_folder(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"RUN must be a run folder .*, got .*nothing"):
        read_run(tmp_path / "nothing")


def test_a_run_without_results(tmp_path: Path) -> None:
    path = generations_run(tmp_path / "run")
    for folder in path.glob("generation_*"):
        shutil.rmtree(folder)
    with pytest.raises(ConfigError, match=r"RUN must have a result, got .*run, where no trial"):
        read_run(path)


def test_numbers_of_a_training_function_of_the_users_own(tmp_path: Path) -> None:
    path = generations_run(
        tmp_path / "run", settings=("search.metric=f1",), diagnostics=False, seeds=0
    )
    for place, result in enumerate(sorted(path.glob("generation_*/result.json"))):
        change(result, f1=0.5 + place / 10)
    run = read_run(path)
    assert run.metric == "f1"
    assert [result.metric(run.metric) for result in run.results] == [0.5, 0.6, 0.7]
    assert run.results[0].metric("nothing") is None
