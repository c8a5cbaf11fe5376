"""Students that start from layers of a deeper teacher."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import timm
import torch
from torch import nn

from selfkd.distill.initial import first_layers, match_layers, start_from_layers
from selfkd.models.mlp import make_mlp
from selfkd.models.resnet import make_resnet


def vit(depth: int, **more: object) -> nn.Module:
    return timm.create_model(
        "vit_tiny_patch16_224", depth=depth, embed_dim=8, num_heads=2, img_size=32, num_classes=3,
        **more,
    )  # fmt: skip


def resnet(depth: int) -> nn.Module:
    return make_resnet(depth=depth, width=4)


@pytest.mark.parametrize(
    ("make", "sizes", "taken"),
    [
        (vit, (2, 4), {"blocks.0": "blocks.1", "blocks.1": "blocks.3"}),
        (vit, (2, 3), {"blocks.0": "blocks.0", "blocks.1": "blocks.2"}),
        # the first block of a stage, of other shapes, is that of the teacher's
        (
            resnet,
            (14, 20),
            {
                **{"features.0": "features.0", "features.1": "features.1"},
                **{"features.2": "features.3", "features.3": "features.4"},
                **{"features.4": "features.6", "features.5": "features.7"},
                "features.6": "features.9",
            },
        ),
    ],
)
def test_layers_are_taken_evenly(
    make: Callable[[int], nn.Module], sizes: tuple[int, int], taken: dict[str, str]
) -> None:
    student, teacher = map(make, sizes)
    mapping = match_layers(student, teacher)
    assert mapping == taken
    names = start_from_layers(student, teacher, mapping)
    ours, theirs = student.state_dict(), teacher.state_dict()
    assert set(names) == set(ours)
    for name, tensor in ours.items():
        path = next((path for path in taken if name.startswith(f"{path}.")), None)
        source = name if path is None else taken[path] + name[len(path) :]
        assert torch.equal(tensor, theirs[source]), name
        assert tensor.data_ptr() != theirs[source].data_ptr()


def test_the_first_layers_are_taken() -> None:
    assert match_layers(vit(2), vit(4), first_layers) == {
        f"blocks.{n}": f"blocks.{n}" for n in (0, 1)
    }


def test_stages_are_matched_each() -> None:
    student = timm.create_model("resnet18", num_classes=2)
    teacher = timm.create_model("resnet34", num_classes=2)
    mapping = match_layers(student, teacher)
    assert mapping["layer2.0"] == "layer2.0"  # which halves the map
    assert mapping["layer2.1"] == "layer2.3"
    assert mapping["layer1.0"] == "layer1.0"
    assert mapping["layer1.1"] == "layer1.2"
    nested = [
        timm.create_model("convnext_atto", depths=d, dims=(4, 4, 8, 8))
        for d in ((1,) * 4, (1, 2, 4, 2))
    ]
    found = match_layers(*nested)
    assert found["stages.2.blocks.0"] == "stages.2.blocks.3"
    assert set(start_from_layers(*nested, found)) == set(nested[0].state_dict())


def test_what_does_not_fit_stays_fresh() -> None:
    """In a list with a mapped layer nothing is copied by its name alone."""
    student, teacher = vit(2), vit(4, class_token=False, global_pool="avg")
    head = student.state_dict()["blocks.1.norm1.weight"]
    names = start_from_layers(student, teacher, {"blocks.0": "blocks.2"})
    assert not any(name.startswith("blocks.1") for name in names)
    assert "pos_embed" not in names  # of one token more
    assert "head.weight" in names
    assert torch.equal(student.state_dict()["blocks.1.norm1.weight"], head)


@pytest.mark.parametrize(
    ("student", "teacher", "message"),
    [
        (lambda: vit(4), lambda: vit(2), r"'blocks': teacher_layers must be at least .*\(4\)"),
        (lambda: resnet(20), lambda: resnet(14), "layers of 'features': teacher_layers must be"),
        (
            lambda: vit(2),
            lambda: timm.create_model("vit_tiny_patch16_224", depth=4, embed_dim=16, num_heads=2),
            r"'blocks.0' of the student must have .* of shape \[16\] as 'blocks.0' of the teacher",
        ),
        (
            lambda: make_mlp(img_size=8, in_chans=1, num_classes=3, width=8),
            lambda: make_mlp(img_size=8, in_chans=1, num_classes=3, width=8, depth=3),
            "must have a list of layers .* give a map of paths",
        ),
        (lambda: vit(2), lambda: resnet(8), "teacher must have a list of layers 'blocks'"),
    ],
)
def test_models_that_do_not_fit_are_refused(
    student: Callable[[], nn.Module], teacher: Callable[[], nn.Module], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        match_layers(student(), teacher())


def test_a_path_that_does_not_exist_names_the_nearest() -> None:
    with pytest.raises(ValueError, match=r"blocks\.1.*got 'blocks\.9'"):
        start_from_layers(vit(2), vit(2), {"blocks.0": "blocks.9"})
