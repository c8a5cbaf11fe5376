"""What students of any task start from."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from selfkd.config import Config, load_config, to_tree
from selfkd.config.validate import check_capacity, check_chain
from selfkd.errors import ConfigError
from selfkd.experiments.confirm import pairs_of
from selfkd.tasks import make_task
from selfkd.tasks.common import make_fresh
from selfkd.tasks.task import Task
from selfkd.training.trial import Trial
from selfkd.worker.jobs import run_job

IMAGES = [
    "model={name: selfkd_resnet20, args: {width: 2}}",
    "student={name: selfkd_resnet8, args: {width: 2}}",
    "data.train_size=100",
]
TEXT = [
    "task=text",
    "data={name: arithmetic, tokenizer: chars, train_size: 50, val_size: 20, context: 32}",
    "model.args={depth: 5, width: 8, heads: 2}",
    "student={name: selfkd_gpt, args: {depth: 2, width: 8, heads: 2}}",
]
BLOCKS = ("transformer.h.0.", "transformer.h.1.")
MAP = "{transformer.h.0: transformer.h.4, transformer.h.1: transformer.h.0}"


def config_of(*settings: str) -> Config:
    return load_config(settings=settings)


def fresh_student(
    config: Config, task: Task, folder: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the states of a fresh student and of its teacher."""
    torch.manual_seed(9)
    teacher = task.make(config.model)
    task.save(folder / "teacher.safetensors", teacher, config.model, {})
    trial = Trial(
        config=config,
        stage="generation-1",
        seed=3,
        model=config.network(),
        path=folder / "student.safetensors",
        targets=folder,
        teachers=[{"hash": "a", "checkpoint": str(folder / "teacher.safetensors")}],
    )
    return make_fresh(task, trial, {}).state_dict(), teacher.state_dict()


@pytest.mark.parametrize(
    ("init", "taken"),
    [("every_other", (1, 4)), ("first", (0, 1)), (MAP, (4, 0)), ("fresh", None)],
)
def test_a_language_model_starts_from_blocks_of_its_teacher(
    tmp_path: Path, init: str, taken: tuple[int, int] | None
) -> None:
    config = config_of(*TEXT, f"train.init={init}")
    task = make_task(to_tree(config))
    found, teacher = fresh_student(config, task, tmp_path)
    state = torch.get_rng_state()
    for name, tensor in found.items():
        source = name
        for block, number in zip(BLOCKS, taken or (), strict=bool(taken)):
            source = source.replace(block, f"transformer.h.{number}.") if block in name else source
        random = tensor.unique().numel() > 2  # neither biases nor norms
        assert torch.equal(tensor, teacher[source]) == (bool(taken) or not random), name
    torch.manual_seed(3)  # what is drawn later is the same as from a fresh start
    task.make(config.network())
    assert torch.equal(torch.get_rng_state(), state)


def test_a_residual_network_starts_from_blocks_of_its_teacher(tmp_path: Path) -> None:
    config = config_of(*IMAGES, "train.init=every_other")
    task = make_task(to_tree(config))
    found, teacher = fresh_student(config, task, tmp_path)
    first = "conv1.weight"
    assert torch.equal(found[f"features.1.{first}"], teacher[f"features.3.{first}"])
    assert torch.equal(found[f"features.2.{first}"], teacher[f"features.4.{first}"])
    assert all(torch.equal(found[name], teacher[name]) for name in found if "features" not in name)


MLP = "model={name: selfkd_mlp, args: {width: 8, depth: 2}}"


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            [*IMAGES, "model.name=selfkd_resnet8", "student.name=selfkd_resnet20"],
            r"train.init must suit the student selfkd_resnet20 \(width 2\) and its teacher "
            r"selfkd_resnet8 \(width 2\), got every_other: layers of 'features': teacher_layers",
        ),
        ([*IMAGES, "student.args.width=4"], r"must have 'conv.weight' of shape \[2, 1, 3, 3\]"),
        ([MLP], "student must have a list of layers"),
        ([*IMAGES, "train.init={features.1: features.99}"], r"path must be that of a submodule \("),
        ([*IMAGES, "train.init={feature.1: features.1}"], r"\(features\.1,.*got 'feature\.1'"),
        ([*IMAGES, "train.init=first", "student.name=selfkd_resnet32"], "teacher_layers must be"),
        ([*TEXT, "student.args.width=4"], r"must have .* of shape .* as 'transformer\.h\.0'"),
        (
            [
                *IMAGES[:1],
                "rounds=2",
                "student=[{name: selfkd_resnet8, args: {width: 2}}, "
                "{name: selfkd_resnet20, args: {width: 2}}]",
            ],
            r"student selfkd_resnet20 \(width 2\) and its teacher selfkd_resnet8",
        ),
    ],
)
def test_what_does_not_fit_is_known_before_training(settings: list[str], fault: str) -> None:
    config = config_of("train.init=every_other", *settings)
    *_, (own, teachers) = pairs_of(config)
    rows = [{"name": model.name, "args": model.args} for model in teachers]
    (row,) = run_job("check", {"config": to_tree(own), "teachers": rows})
    assert re.search(fault, row["fault"]), row["fault"]


def test_a_searched_start_is_tried() -> None:
    config = config_of(MLP, "search.space={train.init: {choice: [fresh, every_other]}}")
    teacher = {"name": config.model.name, "args": config.model.args}
    (row,) = run_job("check", {"config": to_tree(config), "teachers": [teacher]})
    assert "student must have a list of layers" in row["fault"]


@pytest.mark.parametrize(
    ("settings", "fault"),
    [
        (
            ["train.init=other"],
            r"train\.init: must be 'fresh', 'teacher', 'every_other' or 'first'",
        ),
        (["train.init={}"], r"train\.init: must"),
        (["train.init={a: 3}"], r"train\.init\.a: must"),
        (
            ["train.init=every_other", "generation_0={path: x, mean: [0.1], std: [0.1]}"],
            "must be fresh with generation_0",
        ),
        (["train.init=first", "members.source=specialists"], "must be fresh with specialists"),
    ],
)
def test_a_start_that_cannot_be_is_refused(settings: list[str], fault: str) -> None:
    with pytest.raises(ConfigError, match=fault):
        config_of(*settings)


def test_a_map_of_paths_is_of_one_teacher() -> None:
    config = config_of(*IMAGES, "train.init={features.1: features.2}", "rounds=2")
    with pytest.raises(ConfigError, match="rounds: must be 1 with a map of layers"):
        check_chain(config)
    check_chain(config_of(*IMAGES, "train.init={features.1: features.2}", "rounds=1"))


def test_students_of_several_depths_start_from_one_teacher() -> None:
    capacity = "capacity={key: student.args.depth, values: [1, 2]}"
    check_capacity(config_of(*TEXT, capacity, "train.init=every_other"))
    with pytest.raises(ConfigError, match=r"train\.init must be fresh for students of other"):
        check_capacity(config_of(*TEXT, capacity, "train.init=teacher"))
