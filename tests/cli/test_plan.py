"""`--plan` counts what the run then does, and starts nothing."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engine import Count, StopAfter, make_run

from selfkd import generations
from selfkd.cli.plan import (
    Plan,
    plan_capacity,
    plan_ensemble,
    plan_generations,
    plan_study,
)
from selfkd.cli.print_plan import describe_on_policy, print_plan
from selfkd.config import Config, Tree, from_tree, load_config
from selfkd.errors import ConfigError
from selfkd.experiments.capacity import grow
from selfkd.experiments.ensemble import compress
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.experiments.study import compare_arms
from selfkd.worker.jobs import run_job

TINY = (
    *("data.train_size=40", "data.val_size=40", "model={name: selfkd_mlp, args: {width: 4}}"),
    *("train.epochs=2", "search.trials=2", "confirm.seeds=2", "rounds=2", "tracking=none"),
)
CNN = "model={name: selfkd_cnn, args: {width: 2}}"
ARMS = "{a: {}, b: {teacher: a}, c: {teacher: [a, b], seeds: 1}, d: {average: [a, b]}}"
RECIPES: dict[str, tuple[Callable[..., Plan], Callable[..., Any], list[str]]] = {
    "generations": (plan_generations, born_again, []),
    "no seeds": (plan_generations, born_again, ["confirm.seeds=0", "distill.live=true"]),
    "alone": (plan_generations, born_again, ["confirm.baseline=false"]),
    "ensemble alone": (plan_ensemble, compress, ["members=3", "confirm.baseline=false"]),
    "top": (plan_generations, born_again, ["distill.teacher=top:2", "confirm.seeds=0"]),
    "controls": (
        plan_generations,
        born_again,
        [
            "student={name: selfkd_mlp, args: {width: 5}}",
            "controls=[seeds, label_smoothing, dkpp]",
        ],
    ),
    "lineages": (plan_generations, born_again, ["confirm.lineages=2"]),
    "ensemble": (plan_ensemble, compress, ["members=3", "members.use=2"]),
    "sources": (
        plan_ensemble,
        compress,
        [
            "members={count: 2, source: snapshots, compare: [soup]}",
            "search.labels_only_space={train.lr: {uniform: [0.01, 0.1]}}",
        ],
    ),
    "capacity": (plan_capacity, grow, ["members=2", "capacity.values=[4, 2]"]),
    "searched": (
        plan_capacity,
        grow,
        ["members=1", "capacity={values: [2, 4], search: true}"],
    ),
    "study": (plan_study, compare_arms, [f"study.arms={ARMS}"]),
}


@pytest.mark.parametrize("name", RECIPES)
def test_it_counts_what_the_run_does(name: str, tmp_path: Path) -> None:
    make_plan, work, settings = RECIPES[name]
    config = load_config(settings=[*TINY, *settings])
    plan = make_plan(config)
    folder, did = RunFolder.create(tmp_path / "run", config), Count()
    work(make_run(config, folder, did))
    assert sum(stage.trainings for stage in plan.stages) == len(did.kinds("train"))
    cached = {job["checkpoint"] for job in did.kinds("cache_teacher_logits")}
    assert len(cached) == (0 if config.distill.live else plan.teachers)
    for stage in plan.stages:
        done = [
            path
            for pattern in stage.patterns
            for path in folder.path.glob(f"{pattern}/result.json")
        ]
        assert len(done) == stage.trainings, stage.title


def test_of_a_run_that_was_stopped_it_says_what_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(settings=TINY)
    folder = RunFolder.create(tmp_path / "run", config)
    with pytest.raises(KeyboardInterrupt):
        born_again(make_run(config, folder, StopAfter(run_job, 5)))
    done = len(list(folder.path.rglob("trial_*/result.json")))
    assert done
    print_plan(plan_generations(config), "generations", config, folder, None)
    printed = capsys.readouterr().out
    assert re.search(rf"\n all +12 +{done} +{2 * (12 - done)} *\n", printed)
    assert f"by the {done} that are done" in printed


def test_a_transfer_set_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    transfer = "data.transfer={name: digits, size: 200, weight: 0.75}"
    config = load_config(settings=[*TINY, transfer, "data.val_size=40", "confirm.seeds=2"])
    plan = plan_ensemble(config)
    print_plan(plan, "ensemble", config, RunFolder(tmp_path / "run"), None)
    printed = " ".join(capsys.readouterr().out.split())
    assert re.search(r"confirmation, all three 6 ", printed)
    assert "for 40 images and 200 of the transfer set: 10 logits, 20 bytes each" in printed
    assert "mixed: steps of students with teachers have 4 times as many items" in printed


def test_views_are_those_of_each_arm_of_a_study(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = (
        "{labels: {}, light: {teacher: labels, set: {data.augment: light}}, "
        "few: {teacher: labels, set: {data.augment: light, data.train_size: 20}}}"
    )
    config = load_config(settings=[*TINY, f"study.arms={arms}", "data.test_size=10", CNN])
    print_plan(plan_study(config), "study", config, RunFolder(tmp_path / "run"), None)
    printed = " ".join(capsys.readouterr().out.split())
    sizes = "10 x 10 pixels in validation and test, 8 x 8 in training"
    assert f"images: labels: {sizes} images: light, few: shift of 1 pixel; 8 views" in printed
    # two teachers, 8 views of 40 and of 20 images, 20 bytes each
    assert (
        "cached: 19.2 kB of teacher logits, of 4 models for 20 to 40 images in 8 views" in printed
    )


def test_the_command_prints_it_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for setting in TINY for word in ("--set", setting)]
    words += ["--set", "data.jitter=1", "--set", "data.augment.erase=0.25"]
    assert generations.main([*words, "--plan"]) == 0
    printed = capsys.readouterr().out
    assert "\nimages: shift of 1 pixel, erase 0.25; 8 views of each image\n" in printed
    assert "plan of selfkd.generations, of which nothing is started:" in printed
    assert "\ncached:  12.8 kB of teacher logits, of 2 models for 40 images in 8 views" in printed
    assert re.search(r"\ntime:    about \d+ s of training on \d+ worker", printed)
    assert "by short epochs that were timed just now" in printed
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (["resources.gpu=1"], "no guess, as the trials are to have GPUs"),
        (["resources.workers=2"], "no guess, as several workers share a training"),
        (["distill.live=true"], "cached:  no teacher logits, as teachers are run at each step"),
        (["rounds=auto", "rounds_max=3", "confirm.seeds=3"], "at most generations 1 to 3"),
    ],
)
def test_it_says_what_it_cannot_know(
    settings: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    words = [word for setting in (*TINY, *settings) for word in ("--set", setting)]
    assert generations.main([*words, "--plan"]) == 0
    assert said in capsys.readouterr().out


def test_it_says_what_students_write_themselves() -> None:
    settings = ["distill={on_policy: 0.25, live: true}", "train.steps=800", "train.accumulate=2"]
    config = load_config(flags={"task": "text"}, settings=[*settings, "train.batch_size=10"])
    plan = plan_generations(config)
    (line,) = describe_on_policy(plan, [1] * len(plan.stages))
    assert line.startswith("written: 4 k texts by each student with a teacher, in 25% of its steps")
    assert describe_on_policy(plan, [0] * len(plan.stages)) == []
    plan = plan_generations(Config())
    assert describe_on_policy(plan, [1] * len(plan.stages)) == []


def test_of_a_study_it_counts_what_each_arm_needs_of_its_teacher() -> None:
    traces: Tree = {"distill.mode": "traces"}
    arms: Tree = {
        "labels": {},
        "tokens": {"teacher": "labels"},
        "again": {"teacher": "labels", "set": {"train.lr": 0.1}},
        "bare": {"teacher": "labels", "set": {"data.rationales": False}},
        "traces": {"teacher": "labels", "set": traces},
        "right": {"teacher": "labels", "set": traces | {"write.keep": "right"}},
        "many": {"teacher": "labels", "set": traces | {"write.samples": 2}},
        "live": {"teacher": "labels", "set": {"distill.live": True, "distill.on_policy": 1}},
    }
    plan = plan_study(from_tree({"task": "text", "confirm": {"seeds": 3}, "study": {"arms": arms}}))
    assert (plan.teachers, plan.writers, plan.texts) == (6, 6, 9)
    (line,) = describe_on_policy(plan, [1] * len(plan.stages))
    assert line.startswith("written: 3.6 k texts by each student of live, in 100% of its steps")


def test_bad_input_is_code_2_as_without_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generations.main(["--plan", "--model", "selfkd_cmn"]) == 2
    assert "did you mean selfkd_cnn" in capsys.readouterr().err
    assert generations.main(["--plan", "--train", "nowhere.py:f"]) == 2
    assert "--train must be path/file.py:function" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    RunFolder.create(tmp_path / "runs" / "a", Config())
    assert generations.main(["--plan", "--name", "a"]) == 2
    assert "exists already: continue it with --resume runs/a" in capsys.readouterr().err


def test_with_a_function_it_counts_trainings_and_starts_no_ray(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("def train_fn(trial):\n    raise AssertionError\n")
    code = (
        "import sys; from selfkd.generations import main;"
        "main(['--plan', '--train', 'mine.py:train_fn', '--rounds', '1']); "
        "print([m for m in ('ray', 'plotly') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=True
    )
    assert "time:    no guess, as the trainings are those of your own function" in done.stdout
    assert "cached:" not in done.stdout
    assert done.stdout.endswith("[]\n")
    assert sorted(path.name for path in tmp_path.iterdir() if path.suffix) == ["mine.py"]


@pytest.mark.parametrize("make_plan", [plan_ensemble, plan_capacity])
def test_what_cannot_teach_on_the_data_is_refused(
    make_plan: Callable[..., Plan], tmp_path: Path
) -> None:
    settings = ["members={count: 2, source: specialists}", "capacity.values=[4, 2]"]
    config = load_config(settings=[*TINY, *settings])
    with pytest.raises(ConfigError, match="specialists with fewer than 20 classes, got 10: data"):
        print_plan(make_plan(config), "ensemble", config, RunFolder(tmp_path / "run"), None)


HINT = "distill.terms=[{name: hint, student: features.2}]"
ABSENT = "data.transfer: {name: folder, root: nowhere}"


@pytest.mark.parametrize(
    ("make_plan", "settings", "fault"),
    [
        (plan_capacity, [HINT, "capacity.values=[4, 2]"], r"capacity\.values 2: .*: hint: layers"),
        (
            plan_study,
            [f"study.arms={{a: {{}}, b: {{teacher: a, set: {{{ABSENT}}}}}}}"],
            r"study\.arms\.b: data\.transfer\.root must be an existing folder, got nowhere",
        ),
        (
            plan_generations,
            [HINT, "student=[{name: selfkd_mlp, args: {width: 4}}, {name: selfkd_mlp}]"],
            "generation 2: .*: hint: layers must have outputs of one shape",
        ),
    ],
)
def test_what_a_run_refuses_a_plan_refuses(
    make_plan: Callable[..., Plan], settings: list[str], fault: str, tmp_path: Path
) -> None:
    config = load_config(settings=[*TINY, *settings])
    with pytest.raises(ConfigError, match=fault):
        print_plan(make_plan(config), "a", config, RunFolder(tmp_path / "run"), None)
