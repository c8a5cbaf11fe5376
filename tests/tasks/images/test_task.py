"""What is checked of a config's data and networks before anything is trained."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from selfkd.config import load_config, to_tree
from selfkd.tasks.images.task import ImageTask

NORM = "model={name: selfkd_cnn, args: {width: 4}}"
MLP = "model={name: selfkd_mlp, args: {width: 4}}"


def make_task(*settings: str) -> ImageTask:
    return ImageTask(to_tree(load_config(settings=[NORM, *settings])))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["train.batch_size=1"], r"train\.batch_size must be at least 2 with batch .* got 1"),
        (
            ["train.batch_size=3", "resources.workers=2"],
            r"train\.batch_size must be at least 4 with batch normalisation on 2 workers",
        ),
        (
            ["train.batch_size=1", "student.name=selfkd_cnn", MLP],
            r"train\.batch_size must be at least 2",
        ),
        (["data.classes=[3]"], r"data\.classes must be at least 2 classes, got \[3\]: "),
    ],
)
def test_what_no_network_can_train_on_is_refused(settings: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_task(*settings).check()


def test_one_image_a_step_is_fine_without_batch_normalisation() -> None:
    assert make_task("train.batch_size=1", MLP).check().items["train"] == 100


def test_statistics_are_refreshed_with_no_batch_of_one() -> None:
    task = make_task("data.train_size=501")
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.BatchNorm1d(8))
    task.refresh(network)
    images = task.data.train.images
    assert isinstance(images, torch.Tensor)
    assert network[2].num_batches_tracked == 1


def test_what_is_left_out_is_among_the_facts(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("a", "b"):
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(4):
                pixels = random.integers(0, 256, (8, 8, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{number}.png")
            (folder / "notes.txt").touch()
    facts = make_task("data.name=folder", f"data.root={tmp_path}").check()
    assert facts.notes == (
        f"{tmp_path}: 16 images of 2 classes, read at 8x8 pixels; left out: 4 .txt",
    )
    assert make_task().check().notes == ()


@pytest.mark.parametrize("views", ["data.augment=none", "data.augment=strong"])
def test_two_images_are_read_to_try_a_network_of_however_many_there_are(
    views: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = make_task(views)
    whole = next(task.data.batches("train", batch_size=2, views=task.views))
    sizes = []
    split = torch.split

    def counted(order: torch.Tensor, own: list[int]) -> tuple[torch.Tensor, ...]:
        sizes.append(len(order))
        return split(order, own)

    monkeypatch.setattr(torch, "split", counted)
    for found, expected in zip(task.two_images(), whole, strict=True):
        assert torch.equal(found, expected)
    assert set(sizes) == {2}
