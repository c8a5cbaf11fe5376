"""The job that prunes a trained model."""

from pathlib import Path

import pytest
import torch

from selfkd.config import ModelConfig, load_config, to_tree
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.tasks.images.loaded import load_classifier
from selfkd.tasks.images.task import ImageTask
from selfkd.worker.compression import prune
from selfkd.worker.jobs import train

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


def test_a_network_of_timm_is_fine_tuned_with_fewer_channels(tmp_path: Path) -> None:
    """Its checkpoint keeps them through training and loading, also with fresh weights."""
    name = "vit_tiny_patch16_224"
    args = {"img_size": 8, "patch_size": 4, "depth": 1, "embed_dim": 24, "num_heads": 3}
    task, checkpoint = _saved(tmp_path / "a.safetensors", name, args)
    config, save = to_tree(task.config), str(tmp_path / "pruned.safetensors")
    (row,) = prune(config, checkpoint, 0.5, save)
    assert row["model"] == {"name": name, "args": args}
    assert 2 * row["parameters"] < row["parameters_before"]
    hashes = set()
    for fresh in (False, True):
        start, student = {"checkpoint": save, "fresh": fresh}, str(tmp_path / f"{fresh}")
        rows = [*train(config, "pruned", 0, row["model"], [], "", student, start=start)]
        network, facts = task.load(student)
        assert sum(parameter.numel() for parameter in network.parameters()) == row["parameters"]
        assert facts.hash == rows[-1]["hash"]
        hashes.add(facts.hash)
    assert len(hashes) == 2
    assert load_classifier(student).network(task.example(2)).shape == (2, 10)


def test_a_checkpoint_that_says_it_is_far_larger_is_refused(tmp_path: Path) -> None:
    """Before memory is taken for what it says."""
    task, checkpoint = _saved(tmp_path / "a.safetensors", "selfkd_cnn", {"width": 4}, pruned=0.5)
    tensors, facts = load_tensors(Path(checkpoint))
    facts["model"]["args"]["width"] = 400
    path = tmp_path / "b.safetensors"
    save_tensors(path, tensors, facts)
    with pytest.raises(ValueError, match=r"b.safetensors cannot be rebuilt: .* at least 1/100"):
        task.load(str(path))


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
