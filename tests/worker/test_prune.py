"""The job that prunes a trained model."""

from pathlib import Path

import pytest
import torch

from selfkd.config import ModelConfig, load_config, to_tree
from selfkd.tasks.images.task import ImageTask
from selfkd.worker.prune import prune

pytest.importorskip("torch_pruning")


def _saved(path: Path, name: str, args: dict[str, object], **more: object) -> tuple[ImageTask, str]:
    task = ImageTask(to_tree(load_config(settings=["data.train_size=100", "train.epochs=1"])))
    torch.manual_seed(0)
    model = ModelConfig(name=name, args=args)
    task.save(path, task.make(model), model, more)
    return task, str(path)


def test_a_network_of_selfkd_is_saved_under_its_name(tmp_path: Path) -> None:
    task, checkpoint = _saved(tmp_path / "a.safetensors", "selfkd_cnn", {"width": 4})
    save = str(tmp_path / "pruned.safetensors")
    (row,) = prune(to_tree(task.config), checkpoint, 0.3, save)
    assert row["model"] == {"name": "selfkd_cnn", "args": {"width": 3}}
    assert row["parameters"] < row["parameters_before"]
    assert "rounded to 3 of 4" in row["remarks"][0]
    network, facts = task.load(save)
    assert facts.hash == row["hash"]
    assert sum(parameter.numel() for parameter in network.parameters()) == row["parameters"]


@pytest.mark.parametrize(
    ("fraction", "more", "message"),
    [
        (0.99, {}, "in [0.25, 0.75]"),
        (0.5, {"std": [0.3]}, "with the std of the data"),
    ],
)
def test_a_mistake_is_said(
    tmp_path: Path, fraction: float, more: dict[str, object], message: str
) -> None:
    task, checkpoint = _saved(tmp_path / "a.safetensors", "selfkd_cnn", {"width": 4}, **more)
    (row,) = prune(to_tree(task.config), checkpoint, fraction, str(tmp_path / "b.safetensors"))
    assert message in row["fault"]
