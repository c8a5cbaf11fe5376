"""Pairs of digits: two digits a class, no digit in two splits."""

from __future__ import annotations

import torch

from selfkd.data import load_data
from selfkd.data.sources import open_digits


def test_a_pair_is_two_digits_of_one_split_side_by_side() -> None:
    data = load_data("digit_pairs", train_size=10_000)
    assert (len(data.train), len(data.val), len(data.test)) == (10_000, 2000, 5000)
    assert data.class_names[7] == "07"
    assert data.num_classes == 100
    assert data.image_size == 16
    digits = open_digits().pool
    pairs = zip(digits.images, digits.labels.tolist(), strict=True)
    known = {image.numpy().tobytes(): label for image, label in pairs}
    found = []
    for split in (data.train, data.val, data.test):
        assert not split.images[:, :, :4].any()
        assert not split.images[:, :, 12:].any()
        sides = [split.images[:, :, 4:12, :8], split.images[:, :, 4:12, 8:]]
        left, right = ([image.numpy().tobytes() for image in side] for side in sides)
        read = [10 * known[a] + known[b] for a, b in zip(left, right, strict=True)]
        assert read == split.labels.tolist()
        assert len(set(zip(left, right, strict=True))) == len(split)  # no pair twice
        found.append({*left, *right})
    assert [len(each) for each in found] == [600, 300, 897]
    assert not found[0] & found[1]
    assert not found[2] & (found[0] | found[1])
    pixels = data.train.images.double() / 255
    torch.testing.assert_close(pixels.mean().item(), data.mean[0], atol=2e-3, rtol=0)
    torch.testing.assert_close(pixels.std().item(), data.std[0], atol=2e-3, rtol=0)


def test_pairs_are_the_same_in_every_run_but_for_those_chosen_for_training() -> None:
    data, again = load_data("digit_pairs"), load_data("digit_pairs", seed=1)
    assert len(data.train) == 4000
    assert data.train.labels.bincount().tolist() == [40] * 100
    assert data.fingerprint == "68e58888fc7f59ea"
    assert data.fingerprint != again.fingerprint
    assert torch.equal(data.test.images, again.test.images)
