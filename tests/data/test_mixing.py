"""Mixup and cutmix: partners, weights, labels, and the batches that have them."""

import hashlib
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats

from selfkd.data import Data, Split
from selfkd.data.augmentation import Mixing, Operations, Views
from selfkd.data.stream import Stream
from selfkd.data.transfer import TransferSet

IMAGES, CLASSES = 40, 5
PINNED = ("d781ec59f316c530", [0.9648, 0.75, 1.0, 1.0])


def make_split(seed=0, images=IMAGES):
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (images, 3, 10, 12), generator=generator, dtype=torch.uint8)
    return Split(pixels, torch.arange(images) % CLASSES)


def make_data(split=None):
    split = split or make_split()
    names = tuple("abcde")
    return Data("squares", split, split, split, names, 10, (0.0,) * 3, (1 / 255,) * 3, "abc")


class Listed(Stream):
    """Images of a list, as if they were decoded."""

    def __init__(self, images):
        object.__setattr__(self, "images", images)
        object.__setattr__(self, "positions", torch.arange(len(images)))

    def __getitem__(self, i):
        return self.images[i]


MIXED = Views(
    jitter=2, count=4, operations=Operations(count=1), mixing=Mixing(mixup=0.4, cutmix=1.0)
)
ALONE = replace(MIXED, mixing=None)


def read(views=MIXED, data=None, *, batch_size=7, **more):
    """Return inputs and labels of each image of an epoch, by its index."""
    data = data or make_data()
    found = list(data.batches("train", batch_size=batch_size, views=views, view=1, **more))
    inputs, labels, index = (torch.cat(parts) for parts in zip(*found, strict=True))
    back = index.argsort()
    return inputs[back], labels[back]


def test_an_image_is_the_weighted_mean_of_two_views_and_so_is_its_label():
    inputs, labels = read()
    split, index = make_split(), torch.arange(IMAGES)
    partners = MIXED.partners(index, 1, IMAGES)
    own, others = ALONE(split.images, index, 1), ALONE(split.images[partners], partners, 1)
    assert MIXED.mixing is not None
    pixels, weight = MIXED.mixing.weights(MIXED._bits(index, 1), 10, 12)
    expected = (own.double() * pixels + others.double() * (256 - pixels)) / 256
    assert torch.equal(inputs.double(), (expected + 0.5).floor())
    by_box = ((pixels == 0) | (pixels == 256)).flatten(1).all(1)
    assert 10 < int(by_box.sum()) < 30
    one = torch.zeros(IMAGES, CLASSES)
    one[index, split.labels] = weight
    one[index, split.labels[partners]] += 1 - weight
    torch.testing.assert_close(labels, one)


def test_batches_orders_and_streams_have_the_same_mixtures():
    inputs, labels = read()
    assert labels.shape == (IMAGES, CLASSES)
    torch.testing.assert_close(labels.sum(1), torch.ones(IMAGES))
    streamed = make_data(Split(Listed(make_split().images), make_split().labels))
    order = torch.Generator().manual_seed(3)
    for other in (
        read(batch_size=40),
        read(batch_size=1),
        read(generator=order),
        read(data=streamed, batch_size=9),
        read(data=streamed, batch_size=9, workers=2),
    ):
        assert torch.equal(other[0], inputs)
        assert torch.equal(other[1], labels)
    parts = [read(rows=range(start, start + 20)) for start in (0, 20)]
    assert torch.equal(torch.cat([part[0] for part in parts]), inputs)
    assert torch.equal(torch.cat([part[1] for part in parts]), labels)


def test_partners_are_any_image_of_the_split():
    index = torch.arange(5000)
    partners = Views(mixing=Mixing(mixup=1.0)).partners(index, 0, 20)
    assert stats.chisquare(np.bincount(partners, minlength=20)).pvalue > 1e-4
    again = Views(mixing=Mixing(mixup=1.0)).partners(index, 1, 20)
    assert (partners == again).float().mean() < 0.1


@pytest.mark.parametrize("alpha", [0.2, 1.0, 4.0])
def test_weights_are_of_the_beta_distribution(alpha):
    index = torch.arange(4000)
    for mixing in (Mixing(mixup=alpha), Mixing(cutmix=alpha)):
        views = Views(mixing=mixing)
        bits = views._bits(index, 0)
        pixels, weight = mixing.weights(bits, 64, 64)
        assert torch.allclose(pixels.flatten(1).double().mean(1) / 256, weight.double())
        if mixing.mixup:
            expected = stats.beta(alpha, alpha).ppf((np.arange(4000) + 0.5) / 4000)
            assert np.abs(np.sort(weight.numpy()) - expected).mean() < 0.015
        else:  # boxes are cut at the border, so that images keep more
            assert weight.mean() > 0.5
            assert {0, 256} == set(pixels.unique().tolist())


def test_some_images_are_left_as_they_are():
    mixing = Mixing(mixup=1.0, cutmix=1.0, probability=0.3)
    index = torch.arange(4000)
    pixels, weight = mixing.weights(Views(mixing=mixing)._bits(index, 0), 16, 16)
    whole = (pixels == 256).flatten(1).all(1)
    assert torch.equal(whole, weight == 1)
    assert torch.equal(Views(mixing=mixing).are_whole(index, 0, (16, 16)), whole)
    assert Views(flip=True).are_whole(index, 0, (16, 16)).all()
    assert 0.68 < whole.float().mean() < 0.75


def test_an_image_that_is_its_own_partner_is_itself():
    views = Views(mixing=Mixing(mixup=1.0), count=2)
    data = make_data(make_split(images=1))
    inputs, labels = read(views, data)
    assert torch.equal(inputs.to(torch.uint8), make_split(images=1).images)
    assert labels.tolist() == [[1.0, 0, 0, 0, 0]]


def test_repeats_are_views_of_a_part_of_the_images():
    data, views = make_data(), replace(MIXED, count=3)
    whole = {view: read_view(data, views, view) for view in range(3)}
    found = list(
        data.batches("train", batch_size=8, views=views, view=2, repeats=4, generator=seeded())
    )
    assert [len(batch[2]) for batch in found] == [8] * 5
    index = torch.cat([batch[2] for batch in found])
    assert torch.equal(index[::4].repeat_interleave(4), index)
    assert len(index.unique()) == IMAGES // 4
    for inputs, labels, own in found:
        at = views.repeated(2, torch.arange(8), 4)
        assert at.tolist() == [2, 0, 1, 2] * 2
        for place in range(8):
            expected = whole[int(at[place])]
            assert torch.equal(inputs[place], expected[0][own[place]])
            assert torch.equal(labels[place], expected[1][own[place]])


def seeded():
    return torch.Generator().manual_seed(0)


def read_view(data, views, view):
    (found,) = data.batches("train", batch_size=IMAGES, views=views, view=view)
    return found


@pytest.mark.parametrize("labelled", [True, False])
def test_a_transfer_set_is_mixed_with_itself(labelled):
    data, more = make_data(), make_split(seed=1)
    transfer = TransferSet(more, 0.5, labelled, "def", str, "more")
    reading = {"views": MIXED, "view": 1}
    found = data.batches("train", batch_size=10, **reading)
    mixed = transfer.mix(found, [10] * 4, data, epoch=0, seed=0, share=range, **reading)
    alone = read(data=make_data(more))
    for inputs, labels, index in mixed:
        assert torch.equal(inputs[10:], alone[0][index[10:] - IMAGES])
        assert labels.shape == (20 if labelled else 10, CLASSES)
        if labelled:
            assert torch.equal(labels[10:], alone[1][index[10:] - IMAGES])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixup": -1.0}, "mixup must be at least 0, got -1.0"),
        ({"cutmix": float("nan")}, "cutmix must be at least 0, got nan"),
        ({"probability": 1.5}, r"probability must be in \[0, 1\], got 1.5"),
    ],
)
def test_impossible_mixing(settings, message):
    with pytest.raises(ValueError, match=message):
        Mixing(**settings)


def test_views_that_mix_nothing_have_no_partners():
    with pytest.raises(ValueError, match="mixing must be given for images that are mixed"):
        Views(flip=True).partners(torch.arange(2), 0, 10)


def test_pinned_mixture():
    """Cached soft targets outlive a version: this may change only with the recipe's `version`."""
    ramp = torch.arange(4 * 3 * 10 * 12) * 7 % 256
    split = Split(ramp.view(4, 3, 10, 12).to(torch.uint8), torch.arange(4))
    views = Views(0.5, True, 2, 1, 3, Operations(), 0.4, 0.1, 0.5, Mixing(mixup=0.8, cutmix=1.0))
    inputs, labels = read(views, make_data(split))
    found = hashlib.sha256(inputs.to(torch.uint8).numpy().tobytes()).hexdigest()[:16]
    assert views.recipe["version"] == 1
    assert (found, [round(float(label.max()), 4) for label in labels]) == PINNED
