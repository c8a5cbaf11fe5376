"""Averages of classifiers without their data: as the run measures them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from selfkd.config import load_config, to_tree
from selfkd.data.batches import batches
from selfkd.data.folder import open_folder
from selfkd.losses import Average, ensemble_logits
from selfkd.results import Parts
from selfkd.storage.checkpoint import load_tensors, save_tensors
from selfkd.storage.rows import save_row
from selfkd.tasks.images.loaded import ImagePredictor, load_average, load_classifier
from selfkd.tasks.images.networks import NetworkFacts
from selfkd.tasks.images.task import ImageTask

Place = tuple[ImageTask, list[str]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    """Three networks: the second of other normalisation, the third with its classes reversed."""
    config = load_config(settings=["model={name: selfkd_mlp, args: {width: 8, depth: 1}}"])
    task, folder = ImageTask(to_tree(config)), tmp_path_factory.mktemp("loaded")
    changes = [{}, {"mean": [0.5], "std": [0.25]}, {"classes": list(task.data.class_names)[::-1]}]
    files = []
    for number, more in enumerate(changes):
        torch.manual_seed(number)
        file = folder / f"{number}.safetensors"
        task.save(file, task.make(config.model), config.model, more)
        files.append(str(file))
    return task, files


@pytest.mark.parametrize("average", ["probabilities", "logits"])
@pytest.mark.parametrize("weights", [None, [0.5, 0.25, 0.25]])
def test_an_average_is_that_of_the_task(
    place: Place, average: Average, weights: list[float] | None
) -> None:
    task, files = place
    logits = torch.stack([task.predict(file, "val") for file in files])
    wanted = ensemble_logits(logits, average=average, weights=weights)
    found = load_average(files, average=average, weights=weights)
    inputs, _, _ = next(task.data.batches("val", batch_size=400))
    torch.testing.assert_close(found.network(inputs), wanted)
    assert found.names == task.data.class_names
    assert not found.network.training


def test_a_generalist_with_specialists_is_that_of_the_task(place: Place, tmp_path: Path) -> None:
    task, files = place
    names = ["generalist", "one", "other"]
    specials = [{}, {"specialist": [1, 7], "dustbin_shift": 0.5}, {"specialist": [3, 8, 9]}]
    for name, more in zip(names, specials, strict=True):
        tensors, facts = load_tensors(Path(files[0]))
        tensors = {key: value + torch.randn_like(value) / 10 for key, value in tensors.items()}
        save_tensors(tmp_path / f"{name}.safetensors", tensors, facts | more)
    parts = tmp_path / "sources" / "parts.json"
    save_row(parts, Parts(hash="a", parts=tuple(f"../{name}.safetensors" for name in names)))
    wanted = task.predict(str(parts), "val").log_softmax(dim=1)
    found = load_average([str(parts)], average="probabilities", weights=None)
    inputs, _, _ = next(task.data.batches("val", batch_size=400))
    torch.testing.assert_close(found.network(inputs).log_softmax(dim=1), wanted)


def test_pictures_become_the_inputs_of_the_evaluation(tmp_path: Path) -> None:
    """Of a folder of pictures of any size and mode, as its test split has them."""
    rolled = np.random.default_rng(0)
    shapes = {"a": (20, 31, 3), "b": (40, 17, 3), "c": (9, 9)}
    files = []
    for split in ("train", "test"):
        for name, shape in shapes.items():
            file = tmp_path / split / name / "1.png"
            file.parent.mkdir(parents=True)
            Image.fromarray(rolled.integers(0, 256, shape, np.uint8)).save(file)
            files.append(file)
    split = open_folder(tmp_path, 12).test
    assert split is not None
    mean, std = (0.5, 0.4, 0.3), (0.25, 0.5, 0.125)
    wanted, _, _ = next(batches(split, mean=mean, std=std, batch_size=3))
    facts = NetworkFacts(
        hash="", model={}, classes=("a", "b", "c"), mean=mean, std=std, image_size=12
    )
    predictor = ImagePredictor(nn.Identity(), facts)
    (found,) = predictor.inputs(files[3:], batch_size=3, device=torch.device("cpu"))
    assert torch.equal(found, wanted)


def test_pictures_of_any_mode_are_read_as_the_data_were(tmp_path: Path) -> None:
    """As files, as Pillow images, and arrays with alpha."""
    drawn, exif = np.random.default_rng(0), Image.Exif()
    exif[0x0112] = 6
    rgba = drawn.integers(0, 256, (12, 12, 4), np.uint8)
    kinds = {
        "alpha.png": Image.fromarray(rgba),
        "turned.png": Image.fromarray(rgba[..., :3]),
        "wide.png": Image.fromarray(drawn.integers(0, 65536, (12, 12), np.uint16)),
        "float.tif": Image.fromarray(drawn.random((12, 12), np.float32)),
        "grey_alpha.png": Image.fromarray(rgba[..., 2:]),
    }
    for split in ("train", "test"):
        for name, picture in kinds.items():
            file = tmp_path / split / ("a" if name == "alpha.png" else "b") / name
            file.parent.mkdir(parents=True, exist_ok=True)
            picture.save(file, **({"exif": exif} if name == "turned.png" else {}))
    split = open_folder(tmp_path, 12).test
    assert split is not None
    stats = {"mean": (0.5,) * 3, "std": (0.25,) * 3}
    wanted, _, _ = next(batches(split, batch_size=9, **stats))
    facts = NetworkFacts(hash="", model={}, classes=("a", "b"), image_size=12, **stats)
    predictor = ImagePredictor(nn.Identity(), facts)

    def inputs(items: object) -> torch.Tensor:
        return torch.cat([*predictor.inputs(items, batch_size=9, device=torch.device("cpu"))])

    files = sorted((tmp_path / "test").rglob("*.*"))
    assert torch.equal(inputs(files), wanted)
    opened = [Image.open(file) for file in files]
    for _ in range(2):  # a caller's images stay as they are
        assert torch.equal(inputs(opened), wanted)
    assert torch.equal(inputs(rgba), wanted[:1])
    assert torch.equal(inputs(rgba[None].repeat(2, axis=0)), wanted[[0, 0]])
    greys = [file.name for file in files].index("grey_alpha.png")
    assert torch.equal(inputs([rgba[..., 2:]]), wanted[greys : greys + 1])


def test_other_classes_are_refused(place: Place, tmp_path: Path) -> None:
    _, files = place
    tensors, facts = load_tensors(Path(files[0]))
    save_tensors(tmp_path / "a.safetensors", tensors, facts | {"classes": list("abcdefghij")})
    assert load_classifier(str(tmp_path / "a.safetensors")).names == tuple("abcdefghij")
    with pytest.raises(ValueError, match="must have the classes of all others of its average"):
        load_average([files[0], str(tmp_path / "a.safetensors")], average="logits", weights=None)
