"""Every shipped YAML is read, and says how to run it."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from engine import make_run
from PIL import Image
from torch.nn.functional import cross_entropy

from selfkd.config import ModelConfig, TrainConfig, load_config
from selfkd.config.validate import check_chain, check_study
from selfkd.experiments.generations import born_again
from selfkd.experiments.run_folder import RunFolder
from selfkd.generations import DEFAULT_JOB
from selfkd.models import make_model
from selfkd.training.optimizers import make_optimizer, make_scheduler

FOLDER = Path(__file__).parents[1] / "tune_configs"
CONFIGS = sorted(FOLDER.glob("*.yaml"))
SHAPES = {
    "digits": (10, 1, 8),
    "mnist": (10, 1, 28),
    "cifar10": (10, 3, 32),
    "cifar100": (100, 3, 32),
}
TEXT = sorted((FOLDER / "text").glob("*.yaml"))
KNOWLEDGE = sorted(
    path for folder in ("knowledge", "augmentation") for path in (FOLDER / folder).glob("*.yaml")
)
CIFAR = [path for path in CONFIGS if path.stem.startswith("cifar")]
SMALL = {
    "selfkd_resnet20": "{depth: 8}",
    "selfkd_preresnet20": "{depth: 10}",
    "selfkd_wrn28": "{depth: 10, k: 1}",
    "selfkd_densenet": "{depth: 10, growth_rate: 4}",
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of noise, as large as CIFAR's images."""
    root, noise = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 12), ("test", 4)):
        for label in "ab":
            (root / split / label).mkdir(parents=True)
            for number in range(count):
                pixels = noise.integers(256, size=(32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / split / label / f"{number}.png")
    return root


def test_all_are_here() -> None:
    names = {path.stem for path in CONFIGS}
    assert names >= {
        "digits",
        "digits_noisy",
        "mnist",
        "cifar10_resnet20",
        "cifar10_preresnet20",
        "cifar100_wrn28",
        "cifar100_wrn28_2",
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


@pytest.mark.parametrize("path", TEXT, ids=lambda path: path.stem)
def test_of_text_loads_and_opens_with_its_command(path: Path) -> None:
    config, head = load_config(path), path.read_text().split("\ntask:")[0]
    command = "study" if config.study.arms else "generations"
    assert config.task == "text"
    assert f"python -m selfkd.{command} --config tune_configs/text/{path.name} --name" in head
    assert "Expected:" in head


@pytest.mark.parametrize("path", KNOWLEDGE, ids=lambda path: path.stem)
def test_of_knowledge_loads_and_opens_with_its_command(path: Path) -> None:
    config, head = load_config(path), path.read_text().split("\ndata:")[0]
    if config.study.arms:
        check_study(config)
    check_chain(config)
    if config.study.arms:
        command = "study"
    else:
        command = "generations" if config.student is not None else r"(generations|ensemble)"
    assert re.search(
        rf"python -m selfkd\.{command} --config tune_configs/{path.parent.name}/{path.name}", head
    )


def test_digits_is_the_built_in_default() -> None:
    assert load_config(FOLDER / "digits.yaml") == load_config(flags=DEFAULT_JOB)


def test_the_paper_s_setting_is_in_the_born_again_space() -> None:
    space = load_config(FOLDER / "cifar100_densenet_ban.yaml").space(with_teacher=True)
    assert space["distill.alpha"].contains(1.0)
    assert space["distill.temperature"].contains(1.0)


@pytest.mark.parametrize("path", CIFAR, ids=lambda path: path.stem)
def test_networks_for_a_gpu_take_a_step_at_their_full_size(path: Path) -> None:
    config = load_config(path)
    classes, in_chans, size = SHAPES[config.data.name]
    network = make_model(
        config.model.name,
        config.model.args,
        num_classes=classes,
        in_chans=in_chans,
        image_size=size,
    )
    logits = network(torch.randn(2, in_chans, size, size))
    cross_entropy(logits, torch.tensor([0, classes - 1])).backward()
    assert logits.shape == (2, classes)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("path", CIFAR, ids=lambda path: path.stem)
def test_what_is_for_a_gpu_is_born_again_on_small_data(
    path: Path, images: Path, tmp_path: Path
) -> None:
    """All of the config but its network's size, on the CPU, without CIFAR."""
    whole = load_config(path)
    settings = [
        f"data={{name: folder, root: {images}, image_size: 32, val_size: 4, views: 2}}",
        f"model.args={SMALL[whole.model.name]}",
        *("rounds=1", "train.epochs=1", "train.warmup_epochs=0", "search.trials=1"),
        *("resources={cpu: 1, gpu: 0}", "tracking=none"),  # threads that wait for each other spin
    ]
    config = load_config(path, settings=settings)
    run = RunFolder.create(tmp_path / "run", config)
    born_again(make_run(config, run))
    results = run.results()
    assert [len(result.teachers) for result in results] == [0, 1]
    assert 0 <= results[1].metrics["test_accuracy"] <= 1
    assert whole.confirm.seeds >= 3
