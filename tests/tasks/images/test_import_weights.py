"""Checkpoints from elsewhere for folders of images, with lists of their classes."""

from __future__ import annotations

from pathlib import Path
from unicodedata import normalize

import numpy as np
import pytest
import torch
from PIL import Image

from selfkd.config import Tree, load_config, to_tree
from selfkd.models import make_model
from selfkd.results import Row
from selfkd.storage.checkpoint import load_tensors
from selfkd.worker.ensembling import import_checkpoint

ACCENTED = ["\u00e9", "n"]  # composed, as people type it; a Mac decomposes it in names of files


def make_folder(root: Path, names: list[str]) -> Tree:
    for part in ("train", "test"):
        for name in names:
            (root / part / name).mkdir(parents=True)
            for number in range(6):
                pixels = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{number}.png")
    return to_tree(load_config(settings=["data.name=folder", f"data.root={root}"]))


def imported(root: Path, tree: Tree, saved: object, **settings: object) -> Row:
    torch.save(saved, root / "a.pt")
    source = {"path": str(root / "a.pt"), "model": "selfkd_cnn", **settings}
    return list(import_checkpoint(tree, str(root / "s.safetensors"), source))[-1]


def state() -> dict[str, torch.Tensor]:
    network = make_model("selfkd_cnn", num_classes=2, in_chans=3, image_size=8)
    return dict(network.state_dict())


@pytest.mark.parametrize(
    ("names", "file", "text"),
    [
        (["no", "yes"], "names.yaml", "- yes\n- no\n"),
        (["00", "01"], "names.yaml", "[01, 00]"),
        (["1e3", "null"], "names.txt", "null\n1e3\n"),
        ([normalize("NFD", name) for name in ACCENTED], "names.json", '["n", "\u00e9"]'),
    ],
)
def test_classes_are_told_by_their_names_as_they_are_written(
    tmp_path: Path, names: list[str], file: str, text: str
) -> None:
    tree = make_folder(tmp_path, names)
    (tmp_path / file).write_text(text, encoding="utf-8")
    row = imported(tmp_path, tree, {"net": state()}, classes=str(tmp_path / file))
    assert "fault" not in row
    classes = load_tensors(tmp_path / "s.safetensors")[1]["classes"]
    assert sorted(classes) == sorted(names)
    assert [normalize("NFC", name) for name in classes] != sorted(names)


def test_other_classes_and_an_average_are_named(tmp_path: Path) -> None:
    tree = make_folder(tmp_path, ["cat", "dog"])
    (tmp_path / "names.txt").write_text("cat\ncow\n")
    row = imported(tmp_path, tree, state(), classes=str(tmp_path / "names.txt"))
    assert row["fault"].endswith(
        "names.txt has 2 classes ('cat', 'cow') instead of 2 ('cat', 'dog'); not among them: "
        "'dog'; unknown: 'cow'"
    )
    both = {"state_dict": state(), "state_dict_ema": state()}
    said = imported(tmp_path, tree, both)["said"]
    assert said.startswith(f"{tmp_path}/a.pt has the average 'state_dict_ema' beside the weights")
    assert imported(tmp_path, tree, both, weights="state_dict")["said"] is None
