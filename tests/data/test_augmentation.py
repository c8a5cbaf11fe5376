import json
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from fake_cuda import fake_cuda
from scipy import stats
from torch import Tensor

from selfkd.data.augmentation import Mixing, Operations, Views, random_bits

RECIPES = [
    Views(jitter=2, count=8),
    Views(flip=True, count=8),
    Views(crop=0.5, count=8),
    Views(crop=0.3, flip=True, jitter=3, seed=5, count=8),
]
OF_INTEGERS = [
    Views(operations=Operations(), count=8),
    Views(operations=Operations("trivialaugment"), count=8),
    Views(color=0.4, hue=0.1, count=8),
    Views(erase=0.8, count=8),
    Views(0.5, True, 2, 7, 8, Operations(count=3, magnitude=20), 0.4, 0.1, 0.3),
]


def make_images(n: int = 16, channels: int = 3, height: int = 12, width: int = 9) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    shape = (n, channels, height, width)
    return torch.randint(1, 256, shape, dtype=torch.uint8, generator=generator)


def offsets_of(images: Tensor, jitter: int) -> Tensor:
    """Return the shift (dy, dx) of an image with one bright pixel at its centre, by search."""
    flat = images.flatten(1).argmax(1)
    centre = images.shape[2] // 2
    return torch.stack([flat // images.shape[3] - centre, flat % images.shape[3] - centre], 1)


def make_dots(n: int, size: int = 11) -> Tensor:
    images = torch.zeros(n, 1, size, size, dtype=torch.uint8)
    images[:, :, size // 2, size // 2] = 255
    return images


def make_ramps(n: int, size: int = 64) -> Tensor:
    """Return images whose pixels are the column in channel 0 and the row in channel 1."""
    line = torch.arange(size, dtype=torch.float32)
    plane = torch.stack([line.expand(size, size), line[:, None].expand(size, size)])
    return plane.expand(n, 2, size, size).clone()


# --- random numbers ---


def test_random_bits_are_splitmix64():
    """Numbers are the published finaliser of the key plus a multiple of the golden ratio."""

    def mix(x: int) -> int:
        x &= 2**64 - 1
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return x ^ x >> 31

    golden = 0x9E3779B97F4A7C15
    # the first outputs of splitmix64 seeded with 1234567, as published with the algorithm
    assert mix(1234567 + golden) == 6457827717110365317
    assert mix(1234567 + 2 * golden) == 3203168211198807973
    for seed, stream, index in [(0, 0, 0), (-1, 3, 17), (2**63 + 5, 0, 10**12)]:
        key = mix(index * golden + mix(mix(seed) + stream))
        expected = [mix(key + draw * golden) >> 32 for draw in (1, 2, 3)]
        assert random_bits(seed, torch.tensor([index]), stream, 3).tolist() == [expected]


def test_random_bits_are_uniform():
    bits = random_bits(0, torch.arange(20_000), 0, 4)
    assert bits.min() >= 0
    assert bits.max() < 2**32
    for draw in bits.unbind(1):
        for part in (draw >> 26, draw & 63):  # the highest and the lowest six bits
            assert stats.chisquare(np.bincount(part, minlength=64)).pvalue > 1e-4


@pytest.mark.parametrize(
    "other",
    [
        random_bits(1, torch.arange(20_000), 0, 2)[:, 0],
        random_bits(0, torch.arange(20_000), 1, 2)[:, 0],
        random_bits(0, torch.arange(1, 20_001), 0, 2)[:, 0],
        random_bits(0, torch.arange(20_000), 0, 2)[:, 1],
    ],
    ids=["seed", "stream", "index", "draw"],
)
def test_random_bits_of_neighbours_are_uncorrelated(other):
    bits = random_bits(0, torch.arange(20_000), 0, 1)[:, 0]
    assert abs(np.corrcoef(bits, other)[0, 1]) < 4 / 20_000**0.5
    pairs = np.histogram2d(bits, other, bins=8, range=[[0, 2**32]] * 2)[0]
    assert stats.chisquare(pairs.ravel()).pvalue > 1e-4


# --- a view depends on (seed, index, view) alone ---


@pytest.mark.parametrize(
    ("views", "dtype"),
    [
        *((views, dtype) for views in RECIPES for dtype in (torch.uint8, torch.float32)),
        *((views, torch.uint8) for views in OF_INTEGERS),
    ],
)
def test_view_is_independent_of_the_batch(views, dtype):
    images, index = make_images().to(dtype), torch.arange(100, 116)
    whole = views(images, index, 3)
    assert whole.dtype == dtype
    assert whole.shape == images.shape
    order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
    assert torch.equal(views(images[order], index[order], 3), whole[order])
    for i in range(16):
        assert torch.equal(views(images[i : i + 1], index[i : i + 1], 3)[0], whole[i])
    halves = [views(half, at, 3) for half, at in zip(images.split(5), index.split(5), strict=True)]
    assert torch.equal(torch.cat(halves), whole)
    assert torch.equal(views(images, index, 3), whole)


@pytest.mark.parametrize("views", [*RECIPES, *OF_INTEGERS])
def test_view_draws_no_random_state_and_leaves_its_input(views):
    images = make_images()
    before, state = images.clone(), torch.get_rng_state()
    views(images, torch.arange(16), 1)
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("views", [*RECIPES, *OF_INTEGERS])
def test_views_seeds_and_indices_differ(views):
    images = make_images(1).expand(64, -1, -1, -1)
    index = torch.arange(64)
    one = views(images, index, 0)
    others = [
        views(images, index, 1),
        views(images, index + 64, 0),
        replace(views, seed=views.seed + 1)(images, index, 0),
    ]
    for other in others:
        assert (one != other).flatten(1).any(1).float().mean() > 0.3


@pytest.mark.parametrize("views", [*RECIPES, *OF_INTEGERS])
def test_view_is_independent_of_the_memory_layout(views):
    images, index = make_images(), torch.arange(16)
    expected = views(images, index, 0)
    assert torch.equal(views(images.to(memory_format=torch.channels_last), index, 0), expected)
    spread = images.repeat_interleave(2, dim=3)[..., ::2]
    assert torch.equal(views(spread, index, 0), expected)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("views", [*RECIPES, *OF_INTEGERS])
def test_view_is_independent_of_the_device(views):
    images, index = make_images(), torch.arange(16)
    assert torch.equal(views(images.cuda(), index, 2).cpu(), views(images, index, 2))


@pytest.mark.parametrize("views", [*RECIPES, *OF_INTEGERS])
def test_each_image_can_have_a_view_of_its_own(views):
    images, index, view = make_images(), torch.arange(16), torch.arange(16) % 3
    found = views(images, index, view)
    for i in range(16):
        alone = views(images[i : i + 1], index[i : i + 1], int(view[i]))
        assert torch.equal(found[i : i + 1], alone)


@pytest.mark.parametrize("views", OF_INTEGERS)
def test_no_step_waits_for_a_gpu(views):
    found = replace(views, mixing=Mixing(mixup=0.2, cutmix=1.0))
    index = torch.arange(4)
    for view in (0, torch.tensor([0, 1, 0, 1])):
        with fake_cuda() as waits:
            images = torch.empty(4, 3, 12, 9, dtype=torch.uint8, device="cuda")
            labels = torch.empty(4, dtype=torch.int64, device="cuda")
            own = found(images, index, view)
            others = found(images, found.partners(index, view, 10), view)
            mixed, labels = found.mixed(own, others, labels, labels, index, view, classes=5)
            assert (mixed.device, labels.device) == (images.device,) * 2
        assert waits.found == []
        assert (mixed.shape, labels.shape) == ((4, 3, 12, 9), (4, 5))


# --- what each augmentation does ---


def test_jitter_is_pad_and_crop():
    views, images = Views(jitter=2, count=3), make_images()
    shifted = views(images, torch.arange(16), 2)
    moves = offsets_of(views(make_dots(16), torch.arange(16), 2), 2)
    padded = np.pad(images.numpy(), ((0, 0), (0, 0), (2, 2), (2, 2)))
    for i, (dy, dx) in enumerate(moves.tolist()):
        window = padded[i, :, 2 - dy : 14 - dy, 2 - dx : 11 - dx]
        np.testing.assert_array_equal(shifted[i].numpy(), window)


def test_jitter_moves_are_uniform():
    moves = offsets_of(Views(jitter=2)(make_dots(5000), torch.arange(5000), 0), 2)
    counts = np.bincount((moves + 2) @ torch.tensor([5, 1]), minlength=25)
    assert len(counts) == 25
    assert stats.chisquare(counts).pvalue > 1e-4


def test_flip_mirrors_half_of_the_images():
    images = make_images(1).expand(2000, -1, -1, -1)
    flipped = Views(flip=True)(images, torch.arange(2000), 0)
    mirrored = (flipped == images.flip(3)).flatten(1).all(1)
    assert ((flipped == images).flatten(1).all(1) ^ mirrored).all()
    assert stats.binomtest(int(mirrored.sum()), 2000).pvalue > 1e-4


def test_augmentations_draw_separately():
    """Switching flips on does not change the shifts."""
    images, index = make_dots(50), torch.arange(50)
    both = offsets_of(Views(jitter=2, flip=True)(images, index, 0), 2)
    assert torch.equal(both, offsets_of(Views(jitter=2)(images, index, 0), 2))


@pytest.mark.parametrize("smallest", [0.2, 0.6, 0.95])
def test_crop_is_a_scaled_up_box(smallest):
    n, size = 400, 64
    cropped = Views(crop=smallest)(make_ramps(n, size), torch.arange(n), 0).double()
    column, row = cropped[:, 0].mean(1), cropped[:, 1].mean(2)
    third = size // 3  # away from the borders, where samples are clamped
    width, height = (
        (line[:, -third] - line[:, third]) / (size - 2 * third) for line in (column, row)
    )
    area, aspect = width * height, width / height
    tolerance = 0.01  # weights are in steps of 1/256
    assert area.min() > smallest - tolerance
    assert area.max() < 1 + tolerance
    assert aspect.min() > 0.75 - tolerance
    assert aspect.max() < 4 / 3 + tolerance
    assert abs(area.mean() - (1 + smallest) / 2) < 0.03
    assert abs(aspect.log().mean()) < 0.02  # neither tall nor wide is preferred
    left = column[:, third] - (third + 0.5) * width + 0.5
    assert left.min() > -tolerance * size
    assert (left + width * size).max() < size * (1 + tolerance)

    # the same box through torch's own sampler
    top = row[:, third] - (third + 0.5) * height + 0.5
    theta = torch.zeros(n, 2, 3, dtype=torch.float64)
    theta[:, 0, 0], theta[:, 1, 1] = width, height
    theta[:, 0, 2] = 2 * left / size + width - 1
    theta[:, 1, 2] = 2 * top / size + height - 1
    grid = F.affine_grid(theta, [n, 2, size, size], align_corners=False)
    images = make_ramps(n, size).double()
    expected = F.grid_sample(images, grid, padding_mode="border", align_corners=False)
    assert (cropped - expected).abs().max() < 0.02


def test_crop_of_integers_is_the_rounded_crop_of_floats():
    images, index = make_images(), torch.arange(16)
    views = Views(crop=0.4)
    exact = views(images.double(), index, 0)
    assert torch.equal(views(images, index, 0), (exact + 0.5).floor().to(torch.uint8))
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        cropped = views(images.to(dtype), index, 0)
        assert cropped.dtype == dtype
        torch.testing.assert_close(cropped.double(), exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("views", [Views(), Views(crop=1.0, seed=3), Views(count=4)])
def test_identity(views):
    images = make_images()
    assert views.is_identity
    assert views(images, torch.arange(16), 0) is images
    assert views.at(7) == 0
    assert views.recipe == Views().recipe


@pytest.mark.parametrize("views", RECIPES)
def test_recipe_is_what_a_view_depends_on(views):
    assert not views.is_identity
    assert json.loads(json.dumps(views.recipe)) == views.recipe
    more = Views(views.crop, views.flip, views.jitter, views.seed, count=99)
    assert more.recipe == views.recipe
    assert torch.equal(
        more(make_images(), torch.arange(16), 1), views(make_images(), torch.arange(16), 1)
    )
    changed = [
        Views(0.9, views.flip, views.jitter, views.seed),
        Views(views.crop, not views.flip, views.jitter + 1, views.seed),
        Views(views.crop, views.flip, views.jitter + 1, views.seed),
        Views(views.crop, views.flip, views.jitter, views.seed + 1),
    ]
    changed += OF_INTEGERS
    assert all(other.recipe != views.recipe for other in changed)
    recipes = {json.dumps(other.recipe) for other in changed}
    assert len(recipes) == len(changed)


def test_the_keys_of_views_without_new_augmentation_are_those_of_before():
    expected = {"crop": 0.5, "flip": True, "jitter": 2, "seed": 3, "version": 1}
    off = Views(0.5, True, 2, 3, mixing=Mixing(mixup=0.2, probability=0.0))
    assert off.recipe == Views(0.5, True, 2, 3).recipe == expected
    assert not off.mixes


def test_pinned_view():
    """Cached soft targets outlive a version: this may change only with the recipe's `version`."""
    images = torch.arange(36, dtype=torch.uint8).reshape(1, 1, 6, 6).expand(3, 1, 6, 6)
    views = Views(crop=0.5, flip=True, jitter=1, seed=1, count=2)
    third_rows = views(images, torch.arange(3), 1)[:, 0, 2].tolist()
    assert views.recipe["version"] == 1
    assert third_rows == [[16, 15, 14, 13, 12, 0], [21, 21, 20, 19, 18, 0], [22, 22, 23, 24, 25, 0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"crop": 0.0}, r"crop must be in \(0, 1\], got 0.0"),
        ({"crop": 1.5}, r"crop must be in \(0, 1\], got 1.5"),
        ({"crop": float("nan")}, r"crop must be in \(0, 1\], got nan"),
        ({"jitter": -1}, "jitter must be at least 0, got -1"),
        ({"count": 0}, "count must be at least 1, got 0"),
        ({"color": 1.5}, r"color must be in \[0, 1\], got 1.5"),
        ({"hue": 0.6}, r"hue must be in \[0, 0.5\], got 0.6"),
        ({"erase": float("nan")}, r"erase must be in \[0, 1\], got nan"),
    ],
)
def test_impossible_recipe(settings, message):
    with pytest.raises(ValueError, match=message):
        Views(**settings)


@pytest.mark.parametrize("view", [-1, 2])
def test_view_that_is_not_there(view):
    with pytest.raises(ValueError, match=rf"view must be in \[0, 2\), got {view}"):
        Views(flip=True, count=2)(make_images(), torch.arange(16), view)


@pytest.mark.parametrize(
    ("views", "names"),
    [
        (Views(operations=Operations(), erase=0.1), "operations, erase"),
        (Views(mixing=Mixing(mixup=0.2)), "mixing"),
    ],
)
def test_what_is_of_integers_alone(views, names):
    with pytest.raises(TypeError, match=rf"uint8 for {names}, got torch\.float32"):
        views(make_images().float(), torch.arange(16), 0)


def test_jitter_of_the_image_size():
    with pytest.raises(ValueError, match="jitter must be less than the image size 9, got 9"):
        Views(jitter=9)(make_images(), torch.arange(16), 0)


def test_images_of_another_type():
    with pytest.raises(TypeError, match=r"uint8 or floating point, got torch\.int64"):
        Views(flip=True)(make_images().long(), torch.arange(16), 0)


def test_index_of_another_length():
    with pytest.raises(ValueError, match=r"index must be of shape \[16\], got \[15\]"):
        Views(flip=True)(make_images(), torch.arange(15), 0)


def test_repeats_are_views_that_follow_each_other():
    views = Views(flip=True, count=5)
    first = [views.at(epoch, 2) for epoch in range(4)]
    assert first == [0, 2, 4, 1]
    assert views.repeated(4, torch.arange(6), 2).tolist() == [4, 0, 4, 0, 4, 0]
    assert views.repeated(4, torch.arange(6), 1) == 4
