"""Every shipped YAML is read, and says how to run it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from selfkd.config import ModelConfig, TrainConfig, load_config
from selfkd.models import make_model
from selfkd.train import make_optimizer, make_scheduler

FOLDER = Path(__file__).parents[1] / "tune_configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
SHAPES = {
    "digits": (10, 1, 8),
    "mnist": (10, 1, 28),
    "cifar10": (10, 3, 32),
    "cifar100": (100, 3, 32),
}


def test_all_are_here() -> None:
    names = {path.stem for path in CONFIGS}
    assert names >= {
        "digits",
        "mnist",
        "cifar10_resnet20",
        "cifar100_wrn28",
        "cifar100_densenet_ban",
        "folder",
        "mnist_ensemble",
        "digits_capacity",
    }


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_opens_with_its_command_time_and_hardware(path: Path) -> None:
    head = path.read_text().split("\n\n")[0]
    command = path.stem.rpartition("_")[2]
    command = command if command in ("capacity", "ensemble") else "generations"
    assert f"python -m selfkd.{command} --config tune_configs/{path.name}" in head
    assert "Expected:" in head
    assert re.search(r"GPU|cores", head)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_loads_and_its_model_and_optimiser_can_be_made(path: Path) -> None:
    config = load_config(path)
    classes, in_chans, size = SHAPES.get(config.data.name, (7, 3, config.data.image_size or 64))
    model: ModelConfig = config.model
    with torch.device("meta"):
        network = make_model(
            model.name, model.args, num_classes=classes, in_chans=in_chans, image_size=size
        )
    train: TrainConfig = config.train
    optimizer = make_optimizer(
        network,
        name=train.optimizer,
        lr=train.lr,
        momentum=train.momentum,
        weight_decay=train.weight_decay,
    )
    scheduler = make_scheduler(
        optimizer,
        schedule=train.schedule,
        epochs=train.epochs,
        warmup_epochs=train.warmup_epochs,
        steps_per_epoch=10,
    )
    assert scheduler is not None
    assert optimizer.param_groups


def test_digits_is_the_built_in_default() -> None:
    assert load_config(FOLDER / "digits.yaml") == load_config()


def test_the_paper_s_setting_is_in_the_born_again_space() -> None:
    space = load_config(FOLDER / "cifar100_densenet_ban.yaml").space(taught=True)
    assert space["distill.alpha"].contains(1.0)
    assert space["distill.temperature"].contains(1.0)
