"""The operations of RandAugment and TrivialAugment, colour jitter and erasing."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy import stats
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as TF

from selfkd.data.augmentation import Operations, Views, operations, random_bits
from selfkd.data.augmentation.operations import BINS, NAMES, ONE, apply, turned

TORCHVISION = {"randaugment": v2.RandAugment(), "trivialaugment": v2.TrivialAugmentWide()}
SIZES = [(3, 32, 32), (1, 8, 8), (1, 28, 28), (3, 17, 24)]


def make_image(channels: int = 3, height: int = 32, width: int = 32, seed: int = 0) -> Tensor:
    """Return a smooth picture, in which a place that is off by one has another value."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand((1, channels, height // 4 + 1, width // 4 + 1), generator=generator)
    return (F.interpolate(coarse, (height, width), mode="bilinear")[0] * 255).to(torch.uint8)


def apply_one(image: Tensor, name: str, level: int, *, negative: bool, kind: str) -> Tensor:
    numbers = [torch.tensor([n]) for n in (NAMES.index(name), int(negative), level)]
    return apply(image[None], *numbers, kind=kind)[0]


def torchvisions(image: Tensor, name: str, level: int, *, negative: bool, kind: str) -> Tensor:
    transform = TORCHVISION[kind]
    key = {"autocontrast": "AutoContrast"}.get(name, name.title().replace("_", ""))
    magnitudes, signed = transform._AUGMENTATION_SPACE[key]
    found = magnitudes(BINS, *image.shape[1:])
    magnitude = 0.0 if found is None else float(found[level])
    magnitude *= -1 if signed and negative else 1
    return transform._apply_image_or_video_transform(
        image, key, magnitude, interpolation=transform.interpolation, fill=transform._fill
    )


@pytest.mark.parametrize("kind", TORCHVISION)
@pytest.mark.parametrize("name", NAMES)
def test_operations_are_torchvisions(kind, name):
    """Values differ by one at most; where a place is half a pixel, the pixel is its neighbour."""
    for size in SIZES:
        image = make_image(*size)
        for level in (0, 1, 9, 14, 19, 29, 30):
            for negative in (False, True):
                found = apply_one(image, name, level, negative=negative, kind=kind)
                expected = torchvisions(image, name, level, negative=negative, kind=kind)
                off = ((found.int() - expected.int()).abs() > 1).float().mean()
                ties = name.startswith(("shear", "rotate")) or name == "solarize"
                assert off <= (0.12 if ties else 0), (size, level, negative)


@pytest.mark.parametrize("name", NAMES)
def test_an_operation_changes_its_own_image_alone(name):
    images = torch.stack([make_image(seed=seed) for seed in range(3)])
    names = torch.tensor([0, NAMES.index(name), 0])
    found = apply(images, names, torch.zeros(3).long(), torch.full((3,), 20), kind="randaugment")
    assert torch.equal(found[[0, 2]], images[[0, 2]])
    changed = not torch.equal(found[1], images[1])
    assert changed == (name != "identity")


@pytest.mark.parametrize("kind", TORCHVISION)
def test_a_gpu_applies_the_same_steps_to_all_images(monkeypatch, kind):
    images = make_image().expand(300, -1, -1, -1)
    views, index = Views(operations=Operations(kind), seed=2), torch.arange(300)
    expected = views(images, index, 0)
    monkeypatch.setattr(operations, "_where", lambda chosen, step, *values: step(*values))
    assert torch.equal(views(images, index, 0), expected)


@pytest.mark.parametrize("value", [0, 7, 255])
@pytest.mark.parametrize("name", ["autocontrast", "equalize", "contrast", "color", "sharpness"])
def test_images_of_one_value_are_left(name, value):
    image = torch.full((3, 9, 9), value, dtype=torch.uint8)
    found = apply_one(image, name, 20, negative=False, kind="randaugment")
    assert (found.int() - value).abs().max() <= 1


def test_operations_are_drawn_equally_often_and_in_both_directions():
    image = torch.zeros(4000, 1, 9, 9, dtype=torch.uint8)
    image[:, :, 4, 4] = 200
    bits = random_bits(0, torch.arange(4000), 0, Operations("trivialaugment").draws)
    names, signs, levels = bits[:, -3:].unbind(1)
    for draw, bound in ((names, len(NAMES)), (signs, 2), (levels, BINS)):
        assert stats.chisquare(np.bincount(draw * bound >> 32, minlength=bound)).pvalue > 1e-4
    rotated = Views(operations=Operations("trivialaugment"))(image, torch.arange(4000), 0)
    assert 0.3 < (rotated != image).flatten(1).any(1).float().mean() < 0.95


def test_several_operations_follow_each_other():
    """More of them keep the first, whose draws are the same."""
    images, index = make_image(1, 12, 12).expand(500, -1, -1, -1).contiguous(), torch.arange(500)
    one = Views(operations=Operations(count=1, magnitude=15))
    two = Views(operations=Operations(count=2, magnitude=15))
    bits = random_bits(0, index, 0, two.operations.draws)  # type: ignore[union-attr]
    second = bits[:, -3:] * torch.tensor([len(NAMES), 2, BINS]) >> 32
    expected = apply(
        one(images, index, 0),
        second[:, 0],
        second[:, 1],
        torch.full((500,), 15),
        kind="randaugment",
    )
    assert torch.equal(two(images, index, 0), expected)


@pytest.mark.parametrize("turn", [-0.5, -0.2, 0.0, 0.1, 0.3, 0.5])
def test_hue_is_torchvisions(turn):
    image = torch.randint(0, 256, (3, 40, 40), generator=torch.Generator().manual_seed(0))
    image = image.to(torch.uint8)
    found = turned(image[None], torch.tensor([round(turn * 6 * ONE)]))[0]
    assert (found.int() - TF.adjust_hue(image, turn).int()).abs().max() <= 1


def test_color_jitter_is_torchvisions_at_the_factors_that_were_drawn():
    image = make_image()
    views, index = Views(color=0.4), torch.arange(20)
    found = views(image.expand(20, -1, -1, -1), index, 0)
    draws = random_bits(0, index, 0, 12)[:, 8:11].double() / 2**32
    for own, (brightness, contrast, saturation) in zip(found, 0.6 + 0.8 * draws, strict=True):
        expected = TF.adjust_brightness(image, float(brightness))
        expected = TF.adjust_contrast(expected, float(contrast))
        expected = TF.adjust_saturation(expected, float(saturation))
        assert (own.int() - expected.int()).abs().max() <= 3


def test_grey_images_have_no_hue():
    image = make_image(1)
    assert torch.equal(Views(hue=0.5)(image[None], torch.tensor([0]), 0)[0], image)


@pytest.mark.parametrize("probability", [0.25, 1.0])
def test_erasing_fills_one_box_with_zeros(probability):
    images = torch.full((2000, 2, 20, 30), 9, dtype=torch.uint8)
    erased = Views(erase=probability)(images, torch.arange(2000), 0)[:, 0] == 0
    some = erased.flatten(1).any(1)
    assert stats.binomtest(int(some.sum()), 2000, probability).pvalue > 1e-4
    rows, columns = erased.any(2).sum(1), erased.any(1).sum(1)
    assert torch.equal(erased.flatten(1).sum(1), rows * columns)  # a box
    area, aspect = (rows * columns / 600)[some], (rows / columns)[some].log()
    assert 0.01 < area.min() < 0.04
    assert 0.25 < area.max() < 0.36
    assert abs(aspect.mean()) < 0.15
    where = erased[some].float().mean(0)
    assert where.max() / where[10, 15] < 1.3  # the middle is covered most often, or nearly so


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "autoaugment"}, "kind must be one of randaugment, trivialaugment, got"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"magnitude": 31}, r"magnitude must be in \[0, 30\], got 31"),
    ],
)
def test_impossible_operations(settings, message):
    with pytest.raises(ValueError, match=message):
        Operations(**settings)
