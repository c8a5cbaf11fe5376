"""Chains: a network for each generation, each distilled from the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from engine import Count, StopAfter, make_run

import selfkd
from selfkd.cli.plan import plan_generations
from selfkd.config import Config, load_config
from selfkd.config.paths import relative_paths, with_absolute_paths
from selfkd.config.validate import check_capacity, check_chain, check_study, no_generations
from selfkd.errors import ConfigError
from selfkd.experiments.generations import born_again, finished
from selfkd.experiments.run_folder import RunFolder
from selfkd.models import parameters_count
from selfkd.reporting.page import _facts
from selfkd.reporting.read import read_run
from selfkd.reporting.tables import generations_table
from selfkd.tracking.artifacts import Artifacts
from selfkd.worker.jobs import run_job

WIDTHS = (16, 8, 4)
MLP = "{{name: selfkd_mlp, args: {{width: {}, depth: 1}}}}"
CHAIN = f"student=[{MLP.format(8)}, {MLP.format(4)}]"
TINY = [
    f"model={MLP.format(16)}",
    "data.train_size=100",
    "train.epochs=1",
    "search.trials=1",
    "rounds=2",
    "confirm.seeds=2",
]


def config_of(*settings: str) -> Config:
    return load_config(settings=[*TINY, CHAIN, *settings])


def widths(jobs: Any) -> dict[str, int]:
    return {job["stage"]: job["model"]["args"]["width"] for job in jobs}


def test_a_chain_runs_resumes_and_is_loaded(tmp_path: Path) -> None:
    config = config_of()
    folder = RunFolder.create(tmp_path / "run", config)
    with pytest.raises(KeyboardInterrupt):
        born_again(make_run(config, folder, StopAfter(run_job, 9)))
    done = Count()
    summary = born_again(make_run(config, folder, done))
    sizes = [result.parameters for result in summary.generations]
    assert sizes == [1210, 610, 310]
    assert folder.facts.parameters == {
        "model": 1210,
        "student": 310,
        "student_1": 610,
        "student_2": 310,
    }
    assert [row.title for row in summary.controls] == [
        "selfkd_mlp (width 8, depth 1), labels only",
        "selfkd_mlp (width 4, depth 1), labels only",
    ]
    born_again(make_run(config, folder, again := Count()))
    assert again.kinds("train") == []
    assert finished(config, folder) is not None
    for generation, width in enumerate(WIDTHS):
        model = selfkd.load(folder.path, generation=generation)
        assert parameters_count(model.model) == sizes[generation]
        assert f'"width": {width}' in model.card
    run = read_run(folder.path)
    table = generations_table(run)
    assert [row[-1] for row in table.rows][:3] == ["1.21 k", "610", "310"]
    assert dict(_facts(run))["parameters"] == "1.21 k → 610 → 310"
    assert dict(_facts(run))["model"] == "selfkd_mlp → selfkd_mlp → selfkd_mlp"
    artifacts = Artifacts(config, name="run", folder=folder.path)
    assert len([artifacts.models(result) for result in folder.results()]) == 3


def test_each_generation_is_compared_with_its_own_network(tmp_path: Path) -> None:
    config = config_of("confirm.lineages=2")
    folder = RunFolder.create(tmp_path / "run", config)
    summary = born_again(make_run(config, folder, done := Count()))
    assert widths(done.kinds("train")) == {
        **{f"generation-{n}": width for n, width in enumerate(WIDTHS)},
        **{f"confirm-{n}": width for n, width in enumerate(WIDTHS)},
        "confirm_labels_1": 8,
        "confirm_labels": 4,
    }
    planned = sum(stage.trainings for stage in plan_generations(config).stages)
    assert planned == len(done.kinds("train"))
    for row, own in zip(summary.confirmations[1:], summary.controls, strict=True):
        assert row.first is not None
        pairs = zip(row.values, own.values, strict=True)
        assert row.first.value == pytest.approx(sum(a - b for a, b in pairs) / 2)


def test_a_function_of_the_user_s_is_given_each_network(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "import torch\n"
        "def train(trial):\n"
        "    width = trial.model.args['width']\n"
        "    trial.report({'width': width}, student=torch.nn.Linear(1, width))\n"
    )
    config = config_of("search.metric=width", "confirm.seeds=2")
    folder = RunFolder.create(tmp_path / "run", config)
    summary = born_again(make_run(config, folder, run_job, function=f"{file}:train"))
    assert [result.metrics["width"] for result in summary.generations] == list(WIDTHS)
    assert [row.values for row in summary.confirmations] == [(w, w) for w in WIDTHS]
    assert summary.controls == ()


def test_folders_of_a_chain_are_made_absolute(tmp_path: Path) -> None:
    folder = "student=[{name: hf, args: {path: models/a}}, {name: selfkd_gpt}]"
    config = load_config(settings=["task=text", "data.tokenizer=chars", "rounds=2", folder])
    assert relative_paths(config) == [
        "model.args.path: must be absolute (or a URI) in a Ray job, whose own folder is removed "
        "with it, got 'models/a'"
    ]
    first, second = with_absolute_paths(config).students
    assert first.args == {"path": str(Path("models/a").absolute())}
    assert second.args == {}


def test_networks_that_stand_twice_have_one_baseline() -> None:
    chain = [MLP.format(8), MLP.format(8), MLP.format(4)]
    config = config_of("rounds=3", f"student=[{', '.join(chain)}]")
    titles = [stage.title for stage in plan_generations(config).stages]
    assert titles[-5:-3] == [
        "confirmation, selfkd_mlp (width 8, depth 1) on labels",
        "confirmation, selfkd_mlp (width 4, depth 1) on labels",
    ]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("rounds=3", r"as rounds \(3\), got 2: set rounds=2"),
        ("rounds=1", r"as rounds \(1\), got 2"),
        ("rounds=auto", "rounds: must be 2, .* got auto"),
        ("controls=[seeds]", "seeds must be left out with a list"),
    ],
)
def test_a_chain_has_a_network_for_each_generation(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_chain(config_of("confirm.seeds=3", setting))


def test_a_chain_is_of_generations_alone() -> None:
    message = "student: must be one network, as a list is of selfkd.generations only"
    config = config_of()
    assert [fault[: len(message)] for fault in no_generations(config)] == [message]
    for check in (check_capacity, check_study):
        with pytest.raises(ConfigError, match=message):
            check(config)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("student=[]", "student: must .* got \\[\\]"),
        ("student=[{name: a, arg: 3}]", r"student\.0\.arg: unknown key"),
        ("student=[{args: {width: 3}}]", "student: must have a name"),
        ("student=[3]", r"student\.0: must be"),
        ("search.space={student.args.width: {choice: [2, 3]}}", "networks are fixed"),
    ],
)
def test_faults_of_a_chain_name_their_place(setting: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        config_of(setting)
